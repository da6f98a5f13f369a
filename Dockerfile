# docker build -t embstore .
# docker run --rm -v embstore:/data -v /your/audio:/audio:ro embstore extract /audio
#
# On a machine without a GPU, --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU builds> saves gigabytes.
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY embstore embstore
COPY cli cli
COPY migrations migrations
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt /tmp/
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt /wheels/*.whl \
    && pip install --no-cache-dir -c /tmp/constraints.txt --no-deps resemblyzer \
    && useradd --create-home embstore \
    && install --directory --owner=embstore --mode=0700 /data
USER embstore
WORKDIR /home/embstore
ENV EMBSTORE_HOME=/data
VOLUME /data
ENTRYPOINT ["embstore"]
CMD ["--help"]
