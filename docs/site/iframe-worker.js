// Browsers start no Worker for a page that was opened as a file. Search then runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      addEventListener("message", (event) => {
        if (event.source === inside) this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      inside.document.open();
      inside.document.write(
        `<script>
          postMessage = (data) => parent.dispatchEvent(new MessageEvent("message", { data, source: window }));
        <\/script><body><script src="${url}"><\/script>`,
      );
      inside.document.close();
      this.ready = new Promise((done) => inside.addEventListener("load", done));
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
