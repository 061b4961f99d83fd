# vLLM's own OpenAI server with the plugin added. It needs an NVIDIA GPU; deploy/docker/Dockerfile.cpu
# does without. docs/deployment.md says how to run it.
#
#   docker build -t vllm-adaspark .

# Exactly the vLLM that pyproject.toml pins: out-of-tree backends have no stable contract yet.
FROM vllm/vllm-openai:v0.32.0

LABEL org.opencontainers.image.title="vllm-adaspark" \
      org.opencontainers.image.description="Long video on vLLM: AdaSpark, VideoNSA, AdaTP" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/vllm/vllm-openai:v0.32.0"

USER 0
# Weights and compiled kernels go to /cache. 2000 is the base image's user `vllm`; group 0 lets any
# other user of that group write, too, and needs its home and its name from the environment.
RUN install -d -o 2000 -g 0 -m 0775 /cache /home/vllm
ENV HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    FLASHINFER_WORKSPACE_BASE=/cache \
    XDG_CACHE_HOME=/cache \
    HOME=/home/vllm \
    USER=vllm

COPY deploy/docker/entrypoint.py deploy/docker/health.py deploy/docker/requirements.txt \
     /opt/vllm-adaspark/
COPY pyproject.toml README.md LICENSE /opt/vllm-adaspark/source/
COPY vllm_adaspark /opt/vllm-adaspark/source/vllm_adaspark
# The image brings torch, numpy and vLLM; --no-deps makes sure none of them is replaced. The package
# is built by the setuptools that vLLM itself needs, and asks no index for another. A checkout that
# others may not read becomes readable: the server is another user.
RUN chmod -R a+rX /opt/vllm-adaspark \
    && uv pip install --system --no-cache --no-deps --require-hashes --only-binary :all: \
           -r /opt/vllm-adaspark/requirements.txt \
    && uv pip install --system --no-cache --no-deps --no-build-isolation --offline \
           /opt/vllm-adaspark/source \
    && rm -r /opt/vllm-adaspark/source

USER 2000:0
WORKDIR /home/vllm
# What is missing, or not readable for this user, fails here and not at the first start or video.
RUN python3 /opt/vllm-adaspark/entrypoint.py Qwen/Qwen2.5-VL-7B-Instruct --print \
    && python3 -c "import vllm_adaspark.video.decode"
EXPOSE 8000
# Gigabytes of weights may have to be fetched first: failures count after an hour.
HEALTHCHECK --start-period=1h --interval=10s --timeout=5s --retries=3 \
    CMD ["python3", "/opt/vllm-adaspark/health.py"]
ENTRYPOINT ["python3", "/opt/vllm-adaspark/entrypoint.py"]
