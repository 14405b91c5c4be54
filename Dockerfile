# One image for all roles. ACCEL=cpu: onnxruntime; ACCEL=gpu: onnxruntime-gpu and torch with CUDA.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG ACCEL=cpu
RUN python -m venv /opt/ruiji
ENV PATH=/opt/ruiji/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements /build/requirements
RUN pip install --require-hashes -r /build/requirements/${ACCEL}.lock \
    && if [ "${ACCEL}" = gpu ]; then pip install -r /build/requirements/torch.txt; fi
COPY . /build
RUN pip install --no-deps --no-build-isolation /build \
    && pip uninstall -y setuptools pip

FROM ${BASE}
COPY --from=build /opt/ruiji /opt/ruiji
# The ids are overridden by compose with the user's own, so that features belong to them.
USER 1000:1000
ENV PATH=/opt/ruiji/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
ENTRYPOINT ["ruiji"]
CMD ["--help"]
