# The server in a container. CPU by default; for an NVIDIA GPU (13.0 is CUDA's version in torch's index):
#   docker build -t lusifer .
#   docker build -t lusifer-gpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run -p 8000:8000 -v lusifer-cache:/cache lusifer serve starter --host 0.0.0.0
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=search,serving,evaluation
ENV PYTHONDONTWRITEBYTECODE=1 LUSIFER_CACHE=/cache/lusifer HF_HOME=/cache/huggingface
WORKDIR /build
COPY tools/torch.txt tools/
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple -r tools/torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ".[${EXTRAS}]" && useradd --create-home lusifer && mkdir -p /cache && chown lusifer /cache
USER lusifer
WORKDIR /home/lusifer
VOLUME /cache
EXPOSE 8000
ENTRYPOINT ["lusifer"]
CMD ["--help"]
