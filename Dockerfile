# The service's image, for the CPU by default, or for CUDA 13 with `--target gpu`:
#   docker build -t dtem-serve:cpu .
#   docker run --rm --read-only --cap-drop ALL --stop-timeout 30 -p 127.0.0.1:8000:8000 dtem-serve:cpu
# For the GPU image, add `--gpus all` to `docker run`.
#
# The GPU stages come after the CPU stages: a builder that builds every stage above its target downloads no CUDA for
# the CPU image.
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
# Only what names the dependencies and the version, so that the layer below stays cached when other sources change.
COPY pyproject.toml constraints.txt LICENSE ./
COPY app/__init__.py app/
RUN touch README.md

FROM ${PYTHON} AS content
COPY deploy/docker/healthcheck.py /app/
COPY model_store /app/model_store
COPY app /app/app
# Readable by the service's user, whatever the umask of the checkout was.
RUN chmod -R a+rX /app && python -m compileall -q --invalidation-mode checked-hash /app/app

FROM ${PYTHON} AS runtime
# The version is `__version__` in app/__init__.py; deploy/README.md has the command that passes both.
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dtem-serve" \
      org.opencontainers.image.description="Vision Transformer inference with a token merging rate per request" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 dtem && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin dtem
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 DTEM_HOST=0.0.0.0
WORKDIR /app
USER 10001:10001
EXPOSE 8000
# Drains for up to DTEM_DRAIN_SECONDS (20): `docker stop` needs a longer timeout than its default of 10 seconds.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 CMD ["python", "/app/healthcheck.py"]
ENTRYPOINT ["python", "-m", "app"]

FROM build AS build-cpu
# Without the command `dtem`, whose sources are not in the image.
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[cpu]' \
 && rm /opt/venv/bin/dtem

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=content /app /app

FROM build AS build-gpu
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[gpu]' \
 && rm /opt/venv/bin/dtem

FROM runtime AS gpu
ENV DTEM_DEVICE=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/venv /opt/venv
COPY --from=content /app /app

FROM cpu
