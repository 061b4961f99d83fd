# vLLM's own OpenAI server with the plugin added. It needs an NVIDIA GPU:
#
#   docker build -t vllm-adaspark .
#   docker run --gpus all --ipc=host -p 127.0.0.1:8000:8000 vllm-adaspark \
#       Qwen/Qwen2.5-VL-7B-Instruct \
#       --hf-overrides '{"architectures": ["AdaSparkQwen2_5_VLForConditionalGeneration"]}'

# Exactly the vLLM that pyproject.toml pins: out-of-tree backends have no stable contract yet.
FROM vllm/vllm-openai:v0.32.0

COPY . /opt/vllm-adaspark
# The image brings torch, numpy and vLLM; --no-deps makes sure none of them is replaced.
RUN python3 -m pip install --no-cache-dir --no-deps /opt/vllm-adaspark

ENTRYPOINT ["vllm", "serve"]
