# embassy in a container, as a user that is not root and may do nothing but what CAP_NET_ADMIN allows.
#
#   make dist && docker build -t embassy -f Dockerfile target/dist
#   docker run -d --name embassy --net=host --pid=host --cap-drop ALL --cap-add NET_ADMIN \
#     --group-add "$(stat -c %g /var/run/docker.sock)" -v /var/run/docker.sock:/var/run/docker.sock embassy --dnat
#
# BASE is any image with a shell in which nft, iptables and setcap are, or can be installed from Debian's packages.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
RUN command -v nft >/dev/null && command -v iptables >/dev/null && command -v setcap >/dev/null || { \
        apt-get update \
        && apt-get install -y --no-install-recommends ca-certificates iptables libcap2-bin nftables \
        && rm -rf /var/lib/apt/lists/*; \
    }
COPY embassy /usr/bin/embassy
# Ends with the program, unless it hands it down: so it does to nft and iptables. A container without the capability runs too.
RUN setcap cap_net_admin+p /usr/bin/embassy \
    && mkdir -p /var/lib/embassy && chown 65534:65534 /var/lib/embassy
USER 65534:65534
ENTRYPOINT ["/usr/bin/embassy"]
