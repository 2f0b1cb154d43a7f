# embassy in a container with nft and iptables, for kernels without nf_tables. The image of /Dockerfile is smaller.
#
#   make dist && docker build -t embassy:iptables -f dist/iptables.Dockerfile target/dist
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
# embassy hands the capability down to iptables when it starts it. The nft program only names a rule of others that drops captured
# connections. Without the capability the container starts too. Root without capabilities may write what belongs to its group.
RUN setcap cap_net_admin,cap_bpf+p /usr/bin/embassy \
    && mkdir -p /var/lib/embassy && chown 59990:0 /var/lib/embassy && chmod 770 /var/lib/embassy
USER 59990:59990
ENTRYPOINT ["/usr/bin/embassy"]
CMD ["--dnat", "--takeover"]
