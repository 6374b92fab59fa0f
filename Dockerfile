# turret on a CPU. The image contains the bundled model, so the container downloads nothing.
#
#   docker build -t turret .
#   docker run -p 50051:50051 -v ./adapters:/adapters:ro -v ./secrets:/secrets:ro turret \
#       serve --adapter-root /adapters --address 0.0.0.0:50051 \
#       --tls-cert /secrets/cert.pem --tls-key /secrets/key.pem --token-file /secrets/tokens
#
# For OpenAI's API and the console, also publish 8000 and add --http-address 0.0.0.0:8000. With --insecure
# and without tokens, clients must use an IP address in the URL, or a name that --http-allowed-host allows.
#
# The default command listens on 0.0.0.0:50051 and therefore refuses to start without TLS and tokens, or
# --insecure. Metrics stay inside the container (127.0.0.1:9464), where a sidecar can read them. To read
# them from outside, give a token the role metrics and add --metrics-address 0.0.0.0:9464. With TLS, set
# TURRET_HEALTH_FLAGS="--tls-ca /secrets/ca.pem".
#
# For a GPU, build with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 (or cu126 for
# drivers older than 580). The first start compiles kernels for minutes and keeps them in
# /home/turret/.cache, so mount a volume there; or compile those of the bundled model in the build with
# --build-arg COMPUTE_CAPABILITY="8.0 9.0". For another model, add `RUN turret compile` to an image of
# your own. For a fleet on Ray, build with --build-arg EXTRA=cluster.
#
# deploy/constraints.txt pins the packages by version and hash, and TORCH_VERSION pins torch. The base image
# is pinned by a digest for all platforms, so that every build uses the same one. docs/security.md
# describes how to update it.

ARG PYTHON_IMAGE=python:3.12.14-slim-trixie@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_VERSION=2.13.0
ARG EXTRA=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The CPU kernels need a compiler here; the final image needs one only for a GPU. Packages and the model are
# installed before the sources are copied, so that a change of the sources does not download them again.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY deploy/constraints.txt deploy/constraints-cluster.txt /constraints/
RUN python -m venv /opt/turret \
    && /opt/turret/bin/pip install --require-hashes --no-deps --only-binary :all: \
        -r /constraints/constraints.txt ${EXTRA:+-r "/constraints/constraints-$EXTRA.txt"} \
    && /opt/turret/bin/pip install --index-url "$TORCH_INDEX" "torch==$TORCH_VERSION"
COPY . /source
RUN /opt/turret/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /source \
    && /opt/turret/bin/pip install --no-deps --no-index /wheels/turret-*.whl

FROM ${PYTHON_IMAGE}
# For a GPU, Triton compiles C at the first start. For a fleet, KubeRay checks Ray's health with wget, and
# calls ray from a login shell, whose PATH differs from the image's.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRA=""
# hadolint ignore=DL3008,SC2086
RUN case "$TORCH_INDEX" in */cpu) wanted="" ;; *) wanted="gcc libc6-dev" ;; esac \
    && case "$EXTRA" in cluster) wanted="$wanted wget" && ln -s /opt/turret/bin/ray /usr/local/bin/ray ;; esac \
    && if [ -n "$wanted" ]; then \
        apt-get update && apt-get install -y --no-install-recommends $wanted \
            && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --create-home --uid 10001 turret && install -d -o turret /adapters /state
COPY --from=build /opt/turret /opt/turret
ENV PATH=/opt/turret/bin:$PATH TURRET_HEALTH_FLAGS=""
# The user is a number, so that Kubernetes can verify that it is not root.
USER 10001
# Quantises the bundled model now, so that the first start is as fast as later ones.
RUN python -c "from turret.server.models.model_source import resolve_model; \
    from turret.server.models.sources.check import default_cache_dir; \
    resolve_model(None, default_cache_dir())"
ARG COMPUTE_CAPABILITY=""
# hadolint ignore=SC2086
RUN if [ -n "$COMPUTE_CAPABILITY" ]; then turret compile --compute-capability $COMPUTE_CAPABILITY; fi
# gRPC, and HTTP if --http-address is set.
EXPOSE 50051 8000
STOPSIGNAL SIGTERM
# The shell form: TURRET_HEALTH_FLAGS may hold several words. A first start on a GPU compiles kernels for minutes.
# hadolint ignore=DL3025
HEALTHCHECK --interval=10s --timeout=6s --start-period=600s \
    CMD turret health --address 127.0.0.1:50051 $TURRET_HEALTH_FLAGS
ENTRYPOINT ["turret"]
CMD ["serve", "--adapter-root", "/adapters", "--address", "0.0.0.0:50051", "--metrics-address", "127.0.0.1:9464"]
