# docker build -t reglue .                              for CPUs
# docker build -t reglue --build-arg TORCH=cu132 .      for NVIDIA GPUs (docker run --gpus all …)
# docker run --rm -v "$PWD:/work" reglue sample starter --out clothes
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
# What PyTorch is built for, and which extras are installed: see docs/install.md.
ARG TORCH=cpu
ARG EXTRAS=train,evaluate,ode,heif
WORKDIR /source
RUN pip install --no-cache-dir uv==0.13.9 && uv venv /opt/reglue
COPY pyproject.toml README.md LICENSE ./
COPY LICENSES LICENSES
COPY src src
RUN uv pip install --no-cache --python /opt/reglue/bin/python --torch-backend "${TORCH}" ".[${EXTRAS}]"

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 1000 reglue && install --directory --owner reglue /work
COPY --from=build /opt/reglue /opt/reglue
ENV PATH=/opt/reglue/bin:$PATH
USER 1000
WORKDIR /work
ENTRYPOINT ["reglue"]
CMD ["--help"]
