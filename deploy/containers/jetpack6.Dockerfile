# Jetson Orin with JetPack 6.2: Ubuntu 22.04, Python 3.10, CUDA 12.6, TensorRT 10.3.
#   make wheels && docker build -f deploy/containers/jetpack6.Dockerfile -t minicpm-edge:jetpack6 dist
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The image's TensorRT is a package of the system's Python, which the environment must see.
COPY minicpm_edge-*-py3-none-manylinux_2_35_aarch64.whl /wheels/
RUN python3 -m venv --system-site-packages /opt/edge \
    && /opt/edge/bin/pip install --no-cache-dir "$(echo /wheels/*.whl)[jetson,serve]" \
    && rm -r /wheels

# Group video may open the board's GPU.
RUN useradd --create-home --groups video edge \
    && install --directory --mode 1777 /bundle /cache
USER edge
ENV PATH=/opt/edge/bin:$PATH EDGE_CACHE=/cache NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=all
VOLUME ["/bundle", "/cache"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["edge"]
CMD ["serve", "/bundle", "--host", "0.0.0.0"]
