# One image for all roles. ACCEL=cpu: onnxruntime; ACCEL=gpu: onnxruntime-gpu and torch with CUDA.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# The compiler builds the fast resize, what reads and writes many files at once, and what search multiplies and decides
# with; without one, Pillow, Python and numpy do that. It stays in this stage.
RUN (apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev) || echo "no compiler: Pillow resizes, Python reads and writes, numpy searches" >&2
ARG ACCEL=cpu
ENV PATH=/opt/ruiji/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/ruiji
# What changes rarely comes first: the lock, then the code.
COPY requirements/${ACCEL}.lock requirements/serve.lock requirements/turned.lock requirements/torch.txt /build/requirements/
RUN pip install --require-hashes -r /build/requirements/${ACCEL}.lock -r /build/requirements/serve.lock \
        -r /build/requirements/turned.lock \
    && if [ "${ACCEL}" = gpu ]; then pip install -r /build/requirements/torch.txt; fi
COPY . /build
# The final image needs no build tools and no tests, and of SciPy what a hash of a picture needs, which is tried. Compiled
# Python files stay: with them it starts in half the time.
RUN pip install --no-deps --no-build-isolation /build \
    && pip uninstall -y setuptools pip \
    && cd /opt/ruiji/lib/python3.*/site-packages \
    && rm -rf onnx/backend onnxruntime/transformers onnxruntime/quantization pywt \
    && find scipy -mindepth 1 -maxdepth 1 -type d ! -name '_*' ! -name 'fft*' ! -name special -exec rm -rf {} + \
    && find numpy onnx scipy -type d -name tests -prune -exec rm -rf {} + \
    && python -c "import imagehash, PIL.Image; imagehash.phash(PIL.Image.new('L', (32, 32)))"

FROM ${BASE}
COPY --from=build /opt/ruiji /opt/ruiji
ENV PATH=/opt/ruiji/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
# Compose sets the user's own ids, so that features belong to that user.
USER 1000:1000
ENTRYPOINT ["ruiji"]
CMD ["--help"]
