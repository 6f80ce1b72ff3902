# x86-64: the CPU, or with --build-arg EXTRAS=serve,rtx,cuda a GeForce RTX 30, 40 or 50.
#   make wheels && docker build -f deploy/containers/x86.Dockerfile -t minicpm-edge:x86 dist
FROM python:3.12-slim-bookworm

ARG EXTRAS=serve
COPY minicpm_edge-*-py3-none-manylinux_2_35_x86_64.whl /wheels/
RUN python3 -m venv /opt/edge \
    && /opt/edge/bin/pip install --no-cache-dir "$(echo /wheels/*.whl)[$EXTRAS]" \
    && rm -r /wheels

RUN useradd --create-home edge \
    && install --directory --mode 1777 /bundle /cache
USER edge
ENV PATH=/opt/edge/bin:$PATH EDGE_CACHE=/cache NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/bundle", "/cache"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["edge"]
CMD ["serve", "/bundle", "--host", "0.0.0.0"]
