# Jetson Orin with JetPack 7.2: Ubuntu 24.04, Python 3.12, CUDA 13.2, TensorRT 10.16. From JetPack 7 on, boards run the
# images of other ARM machines, and there is no l4t-jetpack.
#   make wheels && docker build -f deploy/containers/jetpack7.Dockerfile -t minicpm-edge:jetpack7 dist
FROM nvcr.io/nvidia/cuda:13.2.1-runtime-ubuntu24.04

# The image knows NVIDIA's packages. Held to JetPack's version: the newest TensorRT there may want a newer driver.
ARG TENSORRT=10.16.2
RUN printf 'Package: *nvinfer* *nvonnxparsers*\nPin: version %s*\nPin-Priority: 1001\n' "$TENSORRT" \
        > /etc/apt/preferences.d/tensorrt \
    && apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*

# TensorRT is a package of the system's Python, which the environment must see.
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
