# vLLM's own OpenAI server with the plugin added. It needs an NVIDIA GPU; deploy/docker/Dockerfile.cpu
# does without. docs/deployment.md says how to run it.
#
#   docker build -t vllm-adaspark .

# Exactly the vLLM that pyproject.toml pins: out-of-tree backends have no stable contract yet.
FROM vllm/vllm-openai:v0.32.0

LABEL org.opencontainers.image.title="vllm-adaspark" \
      org.opencontainers.image.description="Long video on vLLM with AdaSpark" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/vllm/vllm-openai:v0.32.0"

USER 0
# Weights and compiled kernels; 2000 is the base image's user `vllm`, group 0 serves any other user.
RUN install -d -o 2000 -g 0 -m 0775 /cache
ENV HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm

COPY deploy/docker/entrypoint.py deploy/docker/health.py /opt/vllm-adaspark/
COPY pyproject.toml README.md LICENSE /opt/vllm-adaspark/source/
COPY vllm_adaspark /opt/vllm-adaspark/source/vllm_adaspark
# The image brings torch, numpy and vLLM; --no-deps makes sure none of them is replaced.
RUN uv pip install --system --no-cache --no-deps /opt/vllm-adaspark/source

USER 2000:0
WORKDIR /home/vllm
EXPOSE 8000
# Gigabytes of weights may have to be fetched first: failures count after an hour.
HEALTHCHECK --start-period=1h --interval=10s --timeout=5s --retries=3 \
    CMD ["python3", "/opt/vllm-adaspark/health.py"]
ENTRYPOINT ["python3", "/opt/vllm-adaspark/entrypoint.py"]
