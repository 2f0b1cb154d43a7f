# embassy in a container: nothing but its binary, as a non-root user with no capability except CAP_NET_ADMIN.
#
#   make dist && docker build -t embassy -f Dockerfile target/dist
#   docker run -d --name embassy --restart unless-stopped --net=host --pid=host --cap-drop ALL --cap-add NET_ADMIN \
#     --group-add "$(stat -c %g /var/run/docker.sock)" -v /var/run/docker.sock:/var/run/docker.sock \
#     -v embassy:/var/lib/embassy --stop-timeout 15 embassy
#
# It writes the rules by netlink, and needs no program for that. On a kernel without nf_tables it needs iptables: dist/iptables.Dockerfile.
FROM scratch
# The files with their owners, and the binary with CAP_NET_ADMIN as a permitted capability: without it the container starts too.
ADD image.tar.gz /
# The user's ID is embassy's own: as nobody (65534) it could be stopped, and its files read, by whatever else runs as nobody on the host.
USER 59990:59990
ENTRYPOINT ["/usr/bin/embassy"]
# Other flags replace these: with a list of flags, --dnat has to be in it. --takeover: a second container takes over from the first one.
CMD ["--dnat", "--takeover"]
