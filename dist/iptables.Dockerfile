# embassy in a container, as a non-root user with no capability except CAP_NET_ADMIN.
#
#   make dist && docker build -t embassy -f Dockerfile target/dist
#   docker run -d --name embassy --restart unless-stopped --net=host --pid=host --cap-drop ALL --cap-add NET_ADMIN \
#     --group-add "$(stat -c %g /var/run/docker.sock)" -v /var/run/docker.sock:/var/run/docker.sock \
#     -v embassy:/var/lib/embassy --stop-timeout 15 embassy --dnat
#
# BASE is any image with a shell that has nft, iptables and setcap, or can install them from Debian packages.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
RUN command -v nft >/dev/null && command -v iptables >/dev/null && command -v setcap >/dev/null || { \
        apt-get update \
        && apt-get install -y --no-install-recommends ca-certificates iptables libcap2-bin nftables \
        && rm -rf /var/lib/apt/lists/*; \
    }
COPY embassy /usr/bin/embassy
# embassy writes nft rules by netlink, and hands the capability down to iptables when it starts it. The nft program only names a rule of
# others that drops captured connections. Without the capability the container starts too.
#
# The user's ID is embassy's own: as nobody (65534) it could be stopped, and its files read, by whatever else runs as nobody on the host.
RUN setcap cap_net_admin+p /usr/bin/embassy \
    && mkdir -p /var/lib/embassy && chown 59990:59990 /var/lib/embassy
USER 59990:59990
ENTRYPOINT ["/usr/bin/embassy"]
