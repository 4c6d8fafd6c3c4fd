# syntax=docker/dockerfile:1
# A static program in an empty image. Mozilla's root certificates are compiled in.
#   docker build -t sysdig-metrics-adapter:v0.1.0 .
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/sysdig-metrics-adapter:v0.1.0 --push .
# Each platform is built by its own toolchain (emulated where it is not the builder's own), so there is
# no cross compiler to get wrong.
FROM rust:1.95-alpine3.22 AS build
# ring has parts in C.
# hadolint ignore=DL3018
RUN apk add --no-cache musl-dev
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src ./src
RUN cargo build --release --locked --bin sysdig-metrics-adapter

FROM scratch
LABEL org.opencontainers.image.title="sysdig-metrics-adapter" \
      org.opencontainers.image.description="Kubernetes custom metrics from Sysdig Monitor" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /src/target/release/sysdig-metrics-adapter /sysdig-metrics-adapter
USER 65532:65532
EXPOSE 10250
ENTRYPOINT ["/sysdig-metrics-adapter"]
