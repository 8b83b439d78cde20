# The server in a container. CPU by default; another build of torch by uv's name for it, for instance cu130:
#   docker build -t lusifer .
#   docker build -t lusifer-gpu --build-arg TORCH_BACKEND=cu130 .
#   docker run -p 8000:8000 -v lusifer-cache:/cache lusifer serve starter --host 0.0.0.0
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_BACKEND=cpu
ARG EXTRAS=search,serving,evaluation
ENV PYTHONDONTWRITEBYTECODE=1 LUSIFER_CACHE=/cache/lusifer HF_HOME=/cache/huggingface
WORKDIR /build
COPY tools/torch.txt tools/uv.lock tools/
RUN pip install --no-cache-dir --require-hashes --no-deps -r tools/uv.lock \
    && uv pip install --system --no-cache --torch-backend "${TORCH_BACKEND}" -r tools/torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN uv pip install --system --no-cache ".[${EXTRAS}]" && useradd --create-home lusifer \
    && mkdir -p /cache && chown lusifer /cache
USER lusifer
WORKDIR /home/lusifer
VOLUME /cache
EXPOSE 8000
ENTRYPOINT ["lusifer"]
CMD ["--help"]
