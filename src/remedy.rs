//! The fix for the error of a source, from what failed and from the kind of source. Pure.
//!
//! Errors are texts, because libraries and servers create them. They are recognised by words that occur with only one
//! fault.

/// The kind of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceKind {
    Consul,
    Etcd,
    /// A Docker engine, as provider or as discovery.
    Engine,
    File,
    Dns,
}

impl SourceKind {
    #[cfg(test)]
    const ALL: [Self; 5] = [Self::Consul, Self::Etcd, Self::Engine, Self::File, Self::Dns];

    /// From the name of a source, whose first word is the name of its discovery.
    pub(crate) fn of(name: &str) -> Self {
        let kinds = [
            ("consul", Self::Consul),
            ("etcd", Self::Etcd),
            ("file", Self::File),
            ("dns", Self::Dns),
        ];
        let kind = kinds.iter().find(|(scheme, _)| name.starts_with(scheme));
        kind.map_or(Self::Engine, |(_, kind)| *kind)
    }
}

/// What failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The server's name has no address.
    NoAddress,
    /// Names cannot be resolved at all.
    NoResolver,
    /// The servers that look up names do not answer.
    SilentResolver,
    /// They answer that they cannot or will not look it up.
    FailedResolver,
    Refused,
    Unreachable,
    /// The certificate is not signed by a trusted CA.
    UnknownAuthority,
    /// The certificate is for another name, or has expired.
    OtherName,
    Expired,
    /// The server wants a client certificate, or does not accept ours.
    ClientCertificate,
    /// TLS was used on a port without TLS.
    NoTls,
    /// A port with TLS was used without TLS.
    NeedsTls,
    /// Another kind of server answers there.
    OtherProtocol,
    /// The requested object does not exist there.
    NotFound,
    /// The server wants a login or a token, or another one.
    NoLogin,
    /// The login or token has no permission for this.
    Denied,
    NoLeader,
    NoDatacentre,
    /// This etcd has no v2 API.
    NoV2,
    TooMany,
    Late,
    /// The server closed the connection.
    Ended,
    TooLong,
    MissingFile,
    IsFolder,
    NoRight,
    NotToml,
    NotAName,
    ServerFailed,
    EmptyToken,
    Own,
    Unknown,
}

/// The words of each fault, in lower case. The first match counts, so words that occur together with others come first.
const WORDS: &[(Fault, &[&str])] = &[
    (Fault::Own, &["a fault of embassy's own"]),
    // Such an error repeats a line of the file.
    (Fault::NotToml, &["toml parse error"]),
    (Fault::EmptyToken, &["has a character that tokens cannot have"]),
    (Fault::NoResolver, &["/etc/resolv.conf"]),
    (Fault::FailedResolver, &["dns servers of this host answered with an error"]),
    (
        Fault::SilentResolver,
        &["no answer from the dns servers", "with the dns servers of this host"],
    ),
    (Fault::NoAddress, &["has no address", "cannot resolve"]),
    (
        Fault::NeedsTls,
        &["http request to an https server", "http request was sent to https port", "speaks https"],
    ),
    (
        Fault::UnknownAuthority,
        &[
            "unknownissuer",
            "unknown issuer",
            "not trusted",
            "self-signed",
            "self signed",
            "badsignature",
            "causedasendentity",
        ],
    ),
    (Fault::OtherName, &["notvalidforname", "not valid for name", "not valid for any names"]),
    (
        Fault::Expired,
        &[
            "certificate: expired",
            "certificate expired",
            "notvalidyet",
            "not valid yet",
            "not valid after",
        ],
    ),
    (
        Fault::ClientCertificate,
        &[
            "certificaterequired",
            "certificate required",
            "certificateunknown",
            "badcertificate",
            "bad certificate",
            "unknownca",
            "unknown ca",
            "client certificate",
        ],
    ),
    (
        Fault::NoTls,
        &[
            "invalidcontenttype",
            "corrupt message",
            "wrong version number",
            "http response to https client",
        ],
    ),
    (Fault::NoDatacentre, &["no path to datacenter"]),
    (Fault::NoLeader, &["leader", "leadership", "raft"]),
    (Fault::NoV2, &["no v2 api"]),
    (
        Fault::NoLogin,
        &[
            "401 unauthorized",
            "user name is empty",
            "username is empty",
            "invalid user name",
            "invalid username",
            "authentication failed",
            "invalid auth token",
            "acl not found",
            "unauthenticated",
            "insufficient credentials",
        ],
    ),
    (
        Fault::Denied,
        &[
            "403 forbidden",
            "permission denied: ",
            "etcdserver: permission denied",
            "rpc error making call: permission denied",
            "may not read",
        ],
    ),
    (Fault::TooMany, &["http status code 429", "too many requests", "503 service unavailable"]),
    (
        Fault::OtherProtocol,
        &[
            "is this consul",
            "is this etcd",
            "invalid http version",
            "cannot parse the answer",
            "invalid http status",
            "http2 error",
            "frame with invalid size",
            "invalid header",
            "h2 protocol error",
            "invalid http",
        ],
    ),
    (
        Fault::NotFound,
        &[
            "404 not found",
            "405 method",
            "400 bad request",
            "301 moved",
            "302 found",
            "307 temporary",
            "308 permanent",
        ],
    ),
    (
        Fault::ServerFailed,
        &[
            "server failure",
            "servfail",
            "query refused",
            "not implemented",
            "500 internal",
            "502 bad gateway",
            "504 gateway",
            "format error",
            "form error",
        ],
    ),
    (Fault::NotAName, &["is not a name of dns"]),
    (Fault::Unreachable, &["no route to host", "unreachable", "address family not supported"]),
    (Fault::Refused, &["connection refused"]),
    (Fault::TooLong, &["longer than"]),
    (Fault::MissingFile, &["no such file", "no path was found"]),
    (
        Fault::IsFolder,
        &["expected a regular file", "is a directory", "is a folder", "not a regular file"],
    ),
    (Fault::NoRight, &["permission denied", "operation not permitted"]),
    (Fault::NotToml, &["expected", "unknown field", "missing field", "invalid type"]),
    (
        Fault::Late,
        &[
            "timed out",
            "no complete answer within",
            "no answer within",
            "not read within",
            "deadline",
            "no answer",
            "timeout",
        ],
    ),
    (
        Fault::Ended,
        &[
            "connection reset",
            "connection closed",
            "peer closed connection",
            "broken pipe",
            "eof",
            "the stream ended",
            "the events ended",
            "end of file",
            "ended without",
            "incomplete message",
            "error reading",
            "transport error",
            "channel closed",
            "has ended",
            "connection error",
        ],
    ),
    // An empty value reported by a server is not about the token.
    (Fault::EmptyToken, &["is empty"]),
];

impl Fault {
    fn of(kind: SourceKind, error: &str) -> Self {
        let error = without_names(kind, error).to_lowercase();
        let fits = |words: &[&str]| words.iter().any(|words| says(&error, words));
        WORDS.iter().find(|(_, words)| fits(words)).map_or(Self::Unknown, |(fault, _)| *fault)
    }
}

/// An error without the names in it: addresses, paths of files, names in DNS questions, and all quoted texts. Such names
/// may contain any words. A server's answer is quoted too, after its status, and is kept.
fn without_names(kind: SourceKind, error: &str) -> String {
    let error = match error.split_once(": ") {
        Some((what, reason)) if kind == SourceKind::Dns && what.contains(" from ") => reason,
        _ => error,
    };
    let is_name =
        |word: &str| word.contains("://") || kind == SourceKind::File && word.starts_with('/');
    let bare = |word| match is_name(word) {
        true if word.ends_with(':') => ":",
        true => "",
        false => word,
    };
    let text = error.split(' ').map(bare).collect::<Vec<_>>().join(" ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((before, quoted)) = rest.split_once('"') {
        kept.push_str(before);
        let phrase = before.rsplit(": ").next().unwrap_or_default();
        let status = phrase.split(' ').find(|word| !word.is_empty()).unwrap_or_default();
        if status.len() == 3 && status.parse::<u16>().is_ok() {
            kept.push_str(quoted);
            return kept;
        }
        rest = match end_of_quoted(quoted) {
            Some(end) => quoted.get(end + 1..).unwrap_or_default(),
            None => quoted,
        };
    }
    kept + rest
}

/// The position of the quotation mark that ends a text quoted by `{:?}`.
fn end_of_quoted(text: &str) -> Option<usize> {
    let mut is_escaped = false;
    text.bytes().position(|byte| {
        let is_end = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        is_end
    })
}

/// Whether a text contains these words, not as parts of longer ones.
fn says(text: &str, words: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || "-_/".contains(c);
    let begins_word = words.starts_with(char::is_alphanumeric);
    let ends_word = words.ends_with(char::is_alphanumeric);
    text.match_indices(words).any(|(at, _)| {
        let before = text.get(..at).and_then(|before| before.chars().next_back());
        let mut after = text.get(at + words.len()..).unwrap_or_default().chars();
        let goes_on = match after.next() {
            // A name continues after a dot, a sentence does not.
            Some('.') => after.next().is_some_and(is_part),
            next => next.is_some_and(is_part),
        };
        let is_begun = before.is_some_and(|c| is_part(c) || c == '.');
        !(begins_word && is_begun || ends_word && goes_on)
    })
}

/// The fix for the error of the source with this name.
pub(crate) fn of(source: &str, error: &str) -> &'static str {
    let kind = SourceKind::of(source);
    fix(kind, Fault::of(kind, error))
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn fix(kind: SourceKind, fault: Fault) -> &'static str {
    use SourceKind::{Consul, Dns, Engine, Etcd, File};
    match (fault, kind) {
        (Fault::Own, _) => "report this line of the log; embassy starts the source again by itself",

        (Fault::NoAddress, Engine) => {
            "correct the host's name in -docker (DOCKER_HOST), or give its address instead"
        }
        (Fault::NoAddress, _) => {
            "correct the host's name in -discovery, or give its address instead: only /etc/hosts and DNS are asked, not mDNS or LDAP"
        }
        (Fault::NoResolver, _) => {
            "give the server's address instead of its name, or make /etc/resolv.conf readable where embassy runs"
        }

        (Fault::SilentResolver, _) => {
            "start the DNS servers that the error names, let UDP and TCP to their port 53 pass the firewalls, or correct /etc/resolv.conf where embassy runs; or give the server's address instead of its name"
        }

        (Fault::FailedResolver, _) => {
            "try it where embassy runs: dig @<server> <name> has to answer; see the log of the DNS servers that the error names, and whether they may be asked from here, or correct /etc/resolv.conf; or give the server's address instead of its name"
        }

        (Fault::Refused, Consul) => {
            "start Consul, or correct the port in -discovery (Consul's HTTP port is 8500, HTTPS 8501): in a container without --net=host, 127.0.0.1 is the container itself"
        }
        (Fault::Refused, Etcd) => {
            "start etcd, or correct the port in -discovery (etcd's client port is 2379) and --listen-client-urls of etcd: in a container without --net=host, 127.0.0.1 is the container itself"
        }
        (Fault::Refused, Engine) => {
            "start the engine, or set its address with -docker (DOCKER_HOST): dockerd listens on TCP only if it was started with -H tcp://..."
        }
        (Fault::Refused, Dns) => {
            "start the DNS server, or correct the port in -discovery (Consul's DNS port is 8600): dns://<address>:<port>"
        }

        (Fault::Unreachable, _) => {
            "give this host a route to that address, and an address of its kind (IPv4 or IPv6); or correct the address"
        }

        (Fault::UnknownAuthority, Consul) => {
            "set CONSUL_CACERT to the file of the CA that signed Consul's certificate, and mount it if embassy runs in a container"
        }
        (Fault::UnknownAuthority, Etcd) => {
            "set -etcd-cacert to the file of the CA that signed etcd's certificate, and mount it if embassy runs in a container"
        }
        (Fault::UnknownAuthority, Engine) => {
            "put the CA that signed the engine's certificate into ca.pem in DOCKER_CERT_PATH"
        }
        (Fault::OtherName, Consul) => {
            "use a name in -discovery that is in Consul's certificate, or set CONSUL_TLS_SERVER_NAME to one that is"
        }
        (Fault::OtherName, _) => {
            "connect by a name or address that is in the server's certificate, or have it issued with this one"
        }
        (Fault::Expired, _) => {
            "renew the server's certificate, and check the clocks of both hosts (date)"
        }
        (Fault::ClientCertificate, Consul) => {
            "set CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY to a certificate that Consul's CA has signed and that is still valid"
        }
        (Fault::ClientCertificate, Etcd) => {
            "set -etcd-cert and -etcd-keycert to a certificate that etcd's --trusted-ca-file has signed and that is still valid"
        }
        (Fault::ClientCertificate, _) => {
            "put cert.pem and key.pem, signed by the CA that the engine trusts (--tlscacert), into DOCKER_CERT_PATH, and set DOCKER_TLS_VERIFY=1"
        }

        (Fault::NoTls, Consul) => {
            "this port speaks no TLS: use consul:// instead of consuls:// (and no CONSUL_HTTP_SSL), or Consul's HTTPS port, 8501"
        }
        (Fault::NoTls, Etcd) => {
            "this port speaks no TLS: leave -etcd-cert, -etcd-keycert and -etcd-cacert out, or start etcd with --cert-file and --key-file"
        }
        (Fault::NoTls, _) => {
            "this port speaks no TLS: unset DOCKER_TLS_VERIFY, or use the engine's port with TLS (usually 2376)"
        }
        (Fault::NeedsTls, Consul) => {
            "this port speaks TLS: use consuls:// instead of consul://, or Consul's HTTP port, 8500"
        }
        (Fault::NeedsTls, Etcd) => {
            "this port speaks TLS: set -etcd-cacert, and -etcd-cert and -etcd-keycert if etcd wants a certificate"
        }
        (Fault::NeedsTls, _) => {
            "this port speaks TLS: set DOCKER_TLS_VERIFY=1, and DOCKER_CERT_PATH to the folder of the certificates"
        }

        (Fault::OtherProtocol | Fault::NotFound, Consul) => {
            "correct host and port in -discovery: something other than Consul's HTTP API answers there (its port is 8500; Consul uses 8300 to 8302 and 8600 for other things)"
        }
        (Fault::OtherProtocol | Fault::NotFound, Etcd) => {
            "correct host and port in -discovery: something other than etcd's client API answers there (its port is 2379; 2380 is for other members)"
        }
        (Fault::OtherProtocol | Fault::NotFound, Engine) => {
            "correct -docker (DOCKER_HOST): something other than a Docker engine answers there; if it is a proxy of the engine, allow GET of /_ping, /events, /containers and /networks"
        }

        (Fault::NoLogin, Consul) => {
            "set CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE to a token that Consul knows (consul acl token read -self)"
        }
        (Fault::NoLogin, Etcd) => {
            "set ETCD_USERNAME and ETCD_PASSWORD to a user that etcd knows (etcdctl user list)"
        }
        (Fault::NoLogin, _) => {
            "give the credentials that the engine's proxy wants, or connect to the engine itself with -docker"
        }
        (Fault::Denied, Consul) => {
            "give the token of CONSUL_HTTP_TOKEN a policy with service:read and node:read for what the containers ask for"
        }
        (Fault::Denied, Etcd) => {
            "give the user of ETCD_USERNAME a role that may read the branch (etcdctl role grant-permission --prefix=true <role> read <branch>); if authentication is on, a user has to be set"
        }
        (Fault::Denied, Engine) => {
            "allow GET of /_ping, /events, /containers and /networks in the proxy of the engine"
        }

        (Fault::NoLeader, Consul) => {
            "restore the quorum of the Consul servers (consul operator raft list-peers); until then embassy uses the last data"
        }
        (Fault::NoLeader, _) => {
            "restore the quorum of the etcd members (etcdctl endpoint status --cluster); until then embassy uses the last data"
        }
        (Fault::NoDatacentre, _) => {
            "correct dc= in the descriptor or ?dc= in -discovery: consul catalog datacenters lists those that Consul knows"
        }
        (Fault::NoV2, _) => {
            "use etcd:// or etcd3:// instead of etcd2://, or start etcd (up to 3.5) with --enable-v2"
        }
        (Fault::TooMany, Consul) => {
            "raise limits.http_max_conns_per_client of the Consul agent (default 200), which all clients on this host share"
        }
        (Fault::TooMany, Etcd) => {
            "lower the load on etcd, or restore its quorum (etcdctl endpoint status --cluster); embassy asks again by itself"
        }
        (Fault::TooMany, _) => {
            "raise the limit of the proxy before the engine, or connect to the engine itself with -docker"
        }

        (Fault::Late, Engine) => {
            "find out why the engine hangs (docker ps hangs too), and restart it; if it is on another host, let TCP to its port pass the firewalls"
        }
        (Fault::Late, File) => "move the file to a file system that answers: this one hangs",
        (Fault::Late, Dns) => {
            "let UDP and TCP to the DNS server's port pass the firewalls between here and there, or correct the address in -discovery"
        }
        (Fault::Late, _) => {
            "let TCP to its port pass the firewalls between here and there, or correct the address in -discovery; if it is reachable, it hangs or is overloaded: restart it"
        }
        (Fault::Ended, Consul) => {
            "correct host and port in -discovery if something other than Consul answers there (its port is 8500); use consuls:// if it speaks TLS (8501); else the log of the Consul agent says why it ends connections"
        }
        (Fault::Ended, Etcd) => {
            "correct host and port in -discovery if something other than etcd answers there (its port is 2379); set -etcd-cacert if it speaks TLS; else the log of etcd says why it ends connections"
        }
        (Fault::Ended, Engine) => {
            "see the log of the engine (journalctl -u docker) for why it ends connections; if it speaks TLS, set DOCKER_TLS_VERIFY=1"
        }

        (Fault::TooLong, File) => "split the file: 4 MiB are read at most",
        (Fault::TooLong, _) => {
            "make the answer smaller: fewer services, instances or keys in one list, see the limits in docs/operations/sources.md"
        }
        (Fault::MissingFile, File) => {
            "create the file, or correct the path in -discovery (file:///etc/embassy/services.toml has three slashes); mount its folder if embassy runs in a container"
        }
        (Fault::IsFolder, _) => {
            "name a file in -discovery, not a folder: file:///etc/embassy/services.toml"
        }
        (Fault::NoRight, File) => {
            "let embassy's user read the file and its folders (chmod, chown): the image runs as user 59990 unless --user names another"
        }
        (Fault::NotToml | Fault::OtherProtocol, File) => {
            "correct the file at the line that the error names: [[service]] with name and endpoints, as in docs/reference.md under Discovery"
        }
        (Fault::MissingFile | Fault::NoRight, Engine) => {
            "mount the engine's socket or certificates where embassy looks for them, and let embassy's user read them (--group-add, DOCKER_CERT_PATH)"
        }
        (Fault::MissingFile | Fault::NoRight, Consul) => {
            "mount the file that the error names into embassy's container, and let embassy's user read it (CONSUL_CACERT, CONSUL_CLIENT_CERT, CONSUL_CLIENT_KEY, ?token-file=)"
        }
        (Fault::MissingFile | Fault::NoRight, _) => {
            "mount the file that the error names into embassy's container, and let embassy's user read it (-etcd-cacert, -etcd-cert, -etcd-keycert)"
        }
        (Fault::EmptyToken, Consul) => {
            "write the token alone into CONSUL_HTTP_TOKEN or the token file, as consul acl token create prints it (SecretID)"
        }

        (Fault::NotAName, _) => {
            "declare a name that DNS knows, such as web.service.consul, in the descriptor"
        }
        (Fault::ServerFailed | Fault::NotFound | Fault::OtherProtocol, Dns) => {
            "ask that server by hand (dig @<server> -p <port> <name> SRV), and correct its zone or forwarding; or name another server in -discovery"
        }
        (Fault::ServerFailed, Consul) => {
            "see the log of the Consul agent for this error; embassy asks again by itself"
        }
        (Fault::ServerFailed, Etcd) => {
            "see the log of etcd for this error (etcdctl endpoint health); embassy asks again by itself"
        }
        (Fault::ServerFailed, _) => {
            "see the log of the engine for this error (journalctl -u docker); embassy asks again by itself"
        }

        (_, Consul) => {
            "try it where embassy runs: curl <address of -discovery>/v1/status/leader has to print an address"
        }
        (_, Etcd) => {
            "try it where embassy runs: etcdctl --endpoints=<address of -discovery> endpoint health has to say that it is healthy"
        }
        (_, Engine) => {
            "try it where embassy runs: docker -H <address of -docker> info has to answer; embassy doctor checks the socket and its rights"
        }
        (_, File) => {
            "try it where embassy runs: cat <path of -discovery> has to print the services"
        }
        (_, Dns) => "try it where embassy runs: dig @<server> -p <port> <name> SRV has to answer",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Errors as sources report them, with words that only the right fix contains.
    #[test]
    fn each_error_has_a_remedy_of_its_own() {
        for (source, error, words) in [
            (
                "consul web",
                "GET http://127.0.0.1:8500/v1/health/service/web: error sending request: client error (Connect): tcp connect error: Connection refused (os error 111)",
                "start Consul",
            ),
            (
                "consul",
                "GET http://c:8500/v1: error sending request: client error (Connect): dns error: \"c\" has no address in DNS",
                "name in -discovery",
            ),
            (
                "consul",
                "GET https://c:8501/v1: error sending request: client error (Connect): invalid peer certificate: UnknownIssuer",
                "CONSUL_CACERT",
            ),
            (
                "consul",
                "GET https://c:8501/v1: error sending request: client error (Connect): invalid peer certificate: certificate not valid for name \"c\"; certificate is only valid for DnsName(\"d\")",
                "CONSUL_TLS_SERVER_NAME",
            ),
            (
                "consul",
                "GET https://c:8501/v1: error sending request: client error (SendRequest): connection error: received fatal alert: CertificateRequired",
                "CONSUL_CLIENT_CERT",
            ),
            (
                "consul",
                "GET https://c:8500/v1: error sending request: client error (Connect): received corrupt message of type InvalidContentType",
                "consul:// instead",
            ),
            (
                "consul",
                "GET http://c:8501/v1: 400 Bad Request \"Client sent an HTTP request to an HTTPS server.\"",
                "consuls:// instead",
            ),
            ("consul", "GET http://c:8500/v1: 403 Forbidden \"Permission denied\"", "service:read"),
            (
                "consul",
                "GET http://c:8500/v1: 403 Forbidden \"ACL not found\"",
                "a token that Consul knows",
            ),
            (
                "consul web",
                "GET http://c:8500/v1: the token may not read the service or its nodes",
                "service:read",
            ),
            (
                "consul",
                "GET http://c:8500/v1: 500 Internal Server Error \"No cluster leader\"",
                "quorum of the Consul",
            ),
            (
                "consul web in eu",
                "GET http://c:8500/v1: 500 Internal Server Error \"No path to datacenter\"",
                "dc=",
            ),
            (
                "consul",
                "GET http://c:8500/v1: 429 Too Many Requests \"\"",
                "http_max_conns_per_client",
            ),
            (
                "consul",
                "GET http://c:22/v1: error sending request: client error (SendRequest): invalid HTTP version parsed",
                "something other than Consul",
            ),
            (
                "consul",
                "GET http://c:80/v1: 404 Not Found \"<html>\"",
                "something other than Consul",
            ),
            (
                "consul",
                "GET http://c:80/v1: the answer has no X-Consul-Index: is this Consul?",
                "something other than Consul",
            ),
            (
                "consul",
                "GET http://c:8500/v1: error sending request: client error (Connect): dns error: cannot resolve \"c\": the DNS servers of this host answered with an error (10.0.0.1): DNS error: error response: Server Failure",
                "dig",
            ),
            ("consul", "GET http://c:8500/v1: no complete answer within 10 s", "firewalls"),
            ("consul", "token file /t: No such file or directory (os error 2)", "?token-file="),
            ("consul", "CONSUL_HTTP_TOKEN is empty", "SecretID"),
            (
                "etcd /services/web",
                "GET http://127.0.0.1:2379/version: error sending request: client error (Connect): tcp connect error: Connection refused (os error 111)",
                "start etcd",
            ),
            (
                "etcd",
                "etcd v3 at https://e:2379: connect: transport error: invalid peer certificate: UnknownIssuer",
                "-etcd-cacert",
            ),
            (
                "etcd",
                "etcd v3 at http://e:2379: range \"/s\": etcdserver: permission denied",
                "grant-permission",
            ),
            (
                "etcd",
                "etcd v3 at http://e:2379: connect: etcdserver: authentication failed, invalid user ID or password",
                "ETCD_PASSWORD",
            ),
            (
                "etcd",
                "GET http://e:2379/v2/keys/s: 401 Unauthorized \"Insufficient credentials\"",
                "ETCD_USERNAME",
            ),
            (
                "etcd",
                "etcd v3 at http://e:2379: watch: etcdserver: no leader",
                "quorum of the etcd",
            ),
            (
                "etcd2 /s",
                "GET http://e:2379/v2/keys: this etcd has no v2 API: expected one with --enable-v2",
                "--enable-v2",
            ),
            (
                "etcd",
                "-etcd-cacert /ca.pem: No such file or directory (os error 2)",
                "mount the file",
            ),
            (
                "provider",
                "tcp://d:2375: a ping of tcp://d:2375: error sending request: tcp connect error: Connection refused (os error 111)",
                "start the engine",
            ),
            (
                "provider",
                "a ping of tcp://d:2375: 403 Forbidden: no (a proxy of the engine has to allow GET of /_ping)",
                "allow GET",
            ),
            (
                "docker web",
                "a ping of tcp://d:2376: error sending request: client error (Connect): received corrupt message of type InvalidContentType",
                "DOCKER_TLS_VERIFY",
            ),
            ("docker web", "the containers of unix:///d.sock: no answer within 10 s", "docker ps"),
            ("file web", "/etc/s.toml: No such file or directory (os error 2)", "create the file"),
            (
                "file web",
                "watch /etc/none: No path was found. about [\"/etc/none\"]",
                "create the file",
            ),
            ("file web", "/etc: Is a directory (os error 21)", "name a file"),
            ("file web", "/etc/s.toml: Permission denied (os error 13)", "let embassy's user read"),
            ("file web", "/etc/s.toml: TOML parse error at line 1, column 1", "at the line"),
            ("file web", "/etc/s.toml: longer than 4194304 bytes", "split the file"),
            (
                "dns web.service.consul port 80",
                "SRV of web.service.consul from 127.0.0.1:8600: Connection refused",
                "start the DNS server",
            ),
            ("dns web port 80", "SRV of web from 127.0.0.1:53: Server Failure", "dig"),
            ("dns web port 80", "SRV of web from 10.0.0.1:53: request timed out", "UDP"),
            (
                "dns -- port 80",
                "\"--\" is not a name of DNS: label is malformed",
                "a name that DNS knows",
            ),
        ] {
            assert!(of(source, error).contains(words), "{source}: {error}: {}", of(source, error));
        }
    }

    /// A service, a host or a file may have any name.
    #[test]
    fn the_words_of_a_fault_in_a_name_are_none() {
        const REFUSED: &str =
            "client error (Connect): tcp connect error: Connection refused (os error 111)";
        let refused = |url: &str| format!("GET {url}: error sending request: {REFUSED}");
        let service = |name: &str| refused(&format!("http://c:8500/v1/health/service/{name}"));
        for (source, error, words) in [
            ("consul leader", service("leader"), "start Consul"),
            ("consul", refused("http://c:8500/v1/status/leader?wait=429s"), "start Consul"),
            ("consul raft", service("raft-eof"), "start Consul"),
            ("consul", refused("http://leader:8500/v1"), "start Consul"),
            (
                "consul timeout",
                "GET http://c:8500/v1/health/service/timeout: 500 Internal Server Error \"rpc error making call: No cluster leader\"".to_owned(),
                "quorum of the Consul",
            ),
            (
                "consul",
                "GET http://c:8500/v1: 500 Internal Server Error \"rpc error getting client: failed to get conn: EOF\"".to_owned(),
                "log of the Consul agent",
            ),
            (
                "consul",
                "GET http://c:8500/v1: 500 Internal Server Error \"rpc error making call: Permission denied\"".to_owned(),
                "service:read",
            ),
            (
                "consul",
                "GET http://c:8500/v1: 500 Internal Server Error \"leadership lost while committing log\"".to_owned(),
                "quorum of the Consul",
            ),
            (
                "consul",
                "GET https://c:8501/v1: error sending request: connection error: peer closed connection without sending TLS close_notify: https://docs.rs/rustls/latest/rustls/manual/_03_howto/index.html#unexpected-eof".to_owned(),
                of("consul", "GET http://c:8500/v1: error sending request: connection reset"),
            ),
            (
                "consul",
                "GET http://leader:8500/v1: error sending request: client error (Connect): dns error: \"leader.eof\" has no address in DNS".to_owned(),
                "name in -discovery",
            ),
            (
                "etcd",
                "etcd v3 at http://e:2379: range \"/s\": etcdserver: user name is empty".to_owned(),
                "ETCD_USERNAME",
            ),
            (
                "etcd /leader",
                "etcd v3 at http://raft:2379: range \"/leader/\\\"raft\": etcdserver: permission denied".to_owned(),
                "grant-permission",
            ),
            (
                "etcd",
                "etcd v3 at http://e:2379: range \"/raft\": etcdserver: leader changed".to_owned(),
                "quorum of the etcd",
            ),
            (
                "provider",
                "container 0429eof3429 of tcp://d:2375: 500 Internal Server Error: rpc error: code = Unknown".to_owned(),
                "log of the engine",
            ),
            (
                "docker leader",
                format!("container leader of unix:///run/429/eof.sock: {REFUSED}").replace("leader of", "a of"),
                "start the engine",
            ),
            ("file leader", "/etc/leader/429: Permission denied (os error 13)".to_owned(), "embassy's user"),
            (
                "file web",
                "/etc/s.toml: TOML parse error at line 3, column 1\n3 | leader = \"is empty\"\nunknown field `leader`".to_owned(),
                "at the line",
            ),
            (
                "dns leader port 80",
                "SRV of leader from 127.0.0.1:53: Connection refused".to_owned(),
                "start the DNS server",
            ),
            ("dns eof port 80", "SRV of eof from 127.0.0.1:429: Server Failure".to_owned(), "dig"),
        ] {
            assert!(of(source, &error).contains(words), "{source}: {error}: {}", of(source, &error));
        }
    }

    #[test]
    fn every_remedy_says_what_to_do() {
        let faults = WORDS.iter().map(|(fault, _)| *fault).chain([Fault::Unknown]);
        for fault in faults {
            for kind in SourceKind::ALL {
                assert_eq!(crate::text::vague(fix(kind, fault)), None, "{kind:?} {fault:?}");
            }
        }
    }
}
