//! Registries that answer wrongly, slowly, endlessly or never: each is an error, after a limited time, and none counts as
//! an empty answer.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use embassy::discovery::{ConsulSettings, Discoveries, EtcdSettings, Options};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{Followed, list, settings};

/// The answer to a request. Then the connection is closed.
#[derive(Clone)]
enum Answer {
    Bytes(Vec<u8>),
    /// These bytes one at a time, with pauses, endlessly.
    Drip(Vec<u8>),
    /// These bytes, followed by endless further ones.
    Flood(Vec<u8>),
    Silence,
}

/// A server that answers the first request correctly, and all others wrongly.
struct Fake {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    async fn start(first: Vec<u8>, others: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, first.clone(), others.clone(), seen.clone()));
            }
        });
        Self { address, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn serve(
    mut stream: TcpStream,
    first: Vec<u8>,
    others: Answer,
    seen: Arc<Mutex<Vec<String>>>,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let number = {
        let mut seen = seen.lock().unwrap();
        seen.push(String::from_utf8_lossy(&request).into_owned());
        seen.len()
    };
    match others {
        _ if number == 1 && !first.is_empty() => stream.write_all(&first).await?,
        Answer::Bytes(bytes) => stream.write_all(&bytes).await?,
        Answer::Drip(head) => {
            stream.write_all(&head).await?;
            loop {
                tokio::time::sleep(Duration::from_millis(500)).await;
                stream.write_all(b" ").await?;
            }
        }
        Answer::Flood(head) => {
            stream.write_all(&head).await?;
            loop {
                stream.write_all(&[b' '; 1 << 16]).await?;
            }
        }
        Answer::Silence => std::future::pending().await,
    }
    stream.shutdown().await
}

/// A complete HTTP answer.
fn http(status: &str, header: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\n{header}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        .into_bytes()
}

/// All kinds of wrong answers, each with a word of the resulting error.
fn breakages() -> Vec<(Answer, &'static str)> {
    let endless = b"HTTP/1.1 200 OK\r\nX-Consul-Index: 7\r\nX-Etcd-Index: 7\r\n\r\n".to_vec();
    let indexes = "X-Consul-Index: 7\r\nX-Etcd-Index: 7";
    let mut short = http("200 OK", indexes, "[]                    ");
    short.truncate(short.len() - 4);
    vec![
        (Answer::Bytes(http("500 Internal Server Error", "A: b", "rpc error")), "rpc error"),
        (Answer::Bytes(http("503 Service Unavailable", "A: b", "[]")), "503"),
        (Answer::Bytes(http("302 Found", "Location: http://127.0.0.1:1/", "")), "302"),
        (Answer::Bytes(http("200 OK", indexes, "<html>")), "cannot parse the answer"),
        (Answer::Bytes(http("200 OK", indexes, "null")), "cannot parse the answer"),
        (Answer::Bytes(http("200 OK", indexes, "{\"node\":7}")), "cannot parse the answer"),
        (Answer::Bytes(http("200 OK", "A: b", "[]")), "no"),
        (Answer::Bytes(short), "GET"),
        (Answer::Bytes(b"\x00\xff\x00 SSH-2.0\r\n\r\n".to_vec()), "GET"),
        (Answer::Bytes(Vec::new()), "GET"),
        (Answer::Drip(b"H".to_vec()), "GET"),
        (Answer::Drip(endless.clone()), "GET"),
        (Answer::Flood(endless), "longer than"),
        (Answer::Flood(b"HTTP/1.1 200 OK\r\nA: ".to_vec()), "GET"),
        (Answer::Silence, "no complete answer within"),
    ]
}

/// In parallel, because some take as long as the timeout.
#[tokio::test]
async fn nothing_broken_is_believed() {
    let version = http("200 OK", "A: b", r#"{"etcdserver":"2.3.8","etcdcluster":"2.3.0"}"#);
    let (consul, etcd) = (consul_instance("X-Consul-Index: 7"), etcd_instance());
    let one = Some("10.0.0.1:80");
    tokio::join!(
        is_not_believed("consul", b"", None),
        is_not_believed("consul", &consul, one),
        is_not_believed("etcd2", b"", None),
        is_not_believed("etcd2", &etcd, one),
        is_not_believed("etcd", b"", None),
        is_not_believed("etcd", &version, None),
        is_not_believed("etcd3", b"", None),
    );
}

/// Checks that each wrong answer after `first` is an error, and that `endpoint` stays in use.
async fn is_not_believed(scheme: &str, first: &[u8], endpoint: Option<&str>) {
    let tries = breakages().into_iter().enumerate().map(async |(i, (answer, word))| {
        let held = matches!(answer, Answer::Silence | Answer::Drip(_));
        if held && scheme == "consul" && endpoint.is_some() {
            // A query that may be held has a longer timeout than this test.
            return;
        }
        let fake = Fake::start(first.to_vec(), answer).await;
        let address = fake.address.to_string();
        let web = Followed::new(&format!("{scheme}://{address}"), "web;80");
        // The error text of a gRPC client is not checked.
        let known = web.fails(if scheme == "etcd3" { &address } else { word }).await;
        let expected = endpoint.map(|endpoint| vec![endpoint.to_owned()]);
        assert_eq!(list(&known), expected, "{scheme}, breakage {i}: {:?}", known.error);
    });
    futures_util::future::join_all(tries).await;
}

fn consul_instance(header: &str) -> Vec<u8> {
    let body = r#"[{"Node":{"Node":"n","Address":"10.0.0.1"},
        "Service":{"ID":"one","Address":"","Port":80,"Tags":null}}]"#;
    http("200 OK", header, body)
}

fn etcd_instance() -> Vec<u8> {
    let body = r#"{"action":"get","node":{"key":"/web","value":"10.0.0.1:80"}}"#;
    http("200 OK", "X-Etcd-Index: 7", body)
}

/// An increasing index, or answers that always come at once, must not cause a busy loop.
#[tokio::test]
async fn consul_is_not_asked_without_end() {
    for index in ["0", "7", "18446744073709551615"] {
        let answer = consul_instance(&format!("X-Consul-Index: {index}"));
        let fake = Fake::start(Vec::new(), Answer::Bytes(answer)).await;
        let web = Followed::new(&format!("consul://{}", fake.address), "web;80");
        web.sees(&["10.0.0.1:80"]).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let count = fake.requests().len();
        assert!((2..20).contains(&count), "{count} requests in a second");
    }
}

#[tokio::test]
async fn etcd_v2_is_not_asked_without_end() {
    let forgotten = r#"{"errorCode":401,"message":"outdated","index":9}"#;
    for answer in
        [http("200 OK", "X-Etcd-Index: 7", ""), http("400 Bad Request", "A: b", forgotten)]
    {
        let fake = Fake::start(etcd_instance(), Answer::Bytes(answer)).await;
        let web = Followed::new(&format!("etcd2://{}", fake.address), "web;80");
        web.until("an answer", |known| list(known).is_some()).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let count = fake.requests().len();
        assert!((2..20).contains(&count), "{count} requests in a second");
    }
}

/// A pause that the server asks for is kept.
#[tokio::test]
async fn a_server_that_asks_to_be_left_alone_is() {
    for scheme in ["consul", "etcd2"] {
        for (status, few) in [("429 Too Many Requests", true), ("503 Service Unavailable", false)] {
            let header = if few { "Retry-After: 30" } else { "Retry-After: soon" };
            let fake = Fake::start(Vec::new(), Answer::Bytes(http(status, header, ""))).await;
            let web = Followed::new(&format!("{scheme}://{}", fake.address), "web;80");
            web.fails(&status[..3]).await;
            let again = async {
                while fake.requests().len() == 1 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            // A value that is not understood is ignored, and the request is repeated as usual.
            let wait = Duration::from_secs(if few { 2 } else { 20 });
            let comes = tokio::time::timeout(wait, again).await.is_ok();
            assert_eq!(comes, !few, "{scheme}: {header}");
        }
    }
}

/// Many services at a broken registry do not send more and more requests.
#[tokio::test]
async fn many_queries_make_no_storm() {
    const QUERIES: usize = 200;
    let broken = Answer::Bytes(http("500 Internal Server Error", "A: b", ""));
    let tries = ["consul", "etcd2"].map(async |scheme| {
        let fake = Fake::start(Vec::new(), broken.clone()).await;
        let uri = format!("{scheme}://{}", fake.address);
        let discoveries = Discoveries::parse(&[uri], &settings()).unwrap();
        let all: Vec<_> =
            (0..QUERIES).map(|n| Followed::of(&discoveries, &format!("s{n};80"))).collect();
        // Until the pauses have reached their maximum.
        tokio::time::sleep(Duration::from_secs(15)).await;
        let (before, watched) = (fake.requests().len(), Duration::from_secs(10));
        tokio::time::sleep(watched).await;
        let rate = (fake.requests().len() - before) as f64 / watched.as_secs_f64();
        println!("{scheme}: {QUERIES} queries at a broken registry: {rate} requests a second, {before} in the first 15 s");
        // Each pause is 2.5 to 5 s.
        assert!(rate > 0.0 && rate < 80.0, "{scheme}: {rate} requests a second");
        assert!(before < 12 * QUERIES, "{scheme}: {before} requests in the first 15 s");
        drop(all);
    });
    futures_util::future::join_all(tries).await;
}

/// An older store behind the same address: its events are not the awaited ones.
#[tokio::test]
async fn a_store_of_etcd_v2_that_was_restored_behind_a_balancer_is_read_anew() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut reads = 0;
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            if String::from_utf8_lossy(&request).contains("wait=true") {
                // The answer begins, but its event does not arrive.
                let head =
                    "HTTP/1.1 200 OK\r\nX-Etcd-Index: 5\r\nTransfer-Encoding: chunked\r\n\r\n";
                let _ = stream.write_all(head.as_bytes()).await;
                tokio::spawn(async move { stream.read_buf(&mut Vec::new()).await });
                continue;
            }
            reads += 1;
            let index = if reads == 1 { 1000 } else { 5 };
            let body = format!(
                r#"{{"action":"get","node":{{"key":"/web","value":"10.0.0.{}:80"}}}}"#,
                reads.min(2)
            );
            let answer = http("200 OK", &format!("X-Etcd-Index: {index}"), &body);
            let _ = stream.write_all(&answer).await;
        }
    });
    let web = Followed::new(&format!("etcd2://{address}"), "web;80");
    let known = web.sees(&["10.0.0.2:80"]).await;
    assert_eq!(known.failures, 0, "it is no failure");
}

#[tokio::test]
async fn credentials_are_shown_to_the_registry_and_to_nobody_else() {
    let refusal = Answer::Bytes(http("403 Forbidden", "A: b", "no"));
    let settings = Options {
        consul: ConsulSettings {
            token: Some("t0ken".to_owned().into()),
            auth: Some("joe:hunter2".to_owned().into()),
            ..ConsulSettings::default()
        },
        etcd: EtcdSettings {
            user: Some(("joe".to_owned(), "hunter2".to_owned().into())),
            ..EtcdSettings::default()
        },
        ..settings()
    };
    let basic = "authorization: basic am9lomh1bnrlcji=";
    for (scheme, headers) in
        [("consul", &["x-consul-token: t0ken", basic][..]), ("etcd2", &[basic])]
    {
        let fake = Fake::start(Vec::new(), refusal.clone()).await;
        let web = Followed::with(&format!("{scheme}://{}", fake.address), &settings, "web;80");
        let error = web.fails("403").await.error.unwrap();
        let request = fake.requests()[0].to_lowercase();
        for header in headers {
            assert!(request.contains(header), "{header} in {request}");
        }
        for secret in ["t0ken", "hunter2", "am9l"] {
            assert!(!error.contains(secret), "{secret} in {error}");
            assert!(!format!("{settings:?}").contains(secret));
        }
    }
}

#[tokio::test]
async fn what_is_asked_of_consul() {
    let fake = Fake::start(Vec::new(), Answer::Bytes(consul_instance("X-Consul-Index: 7"))).await;
    let uri = format!("consul://{}?dc=dc1&near=_agent&tag=blue", fake.address);
    let settings = Options {
        consul: ConsulSettings {
            namespace: Some("team".to_owned()),
            partition: Some("part".to_owned()),
            ..ConsulSettings::default()
        },
        ..settings()
    };
    let web = Followed::with(&uri, &settings, "a/b.c@d*e[prod];80");
    web.until("an answer", |known| known.answers > 1).await;
    let requests = fake.requests();
    let lines: Vec<_> = requests.iter().filter_map(|request| request.lines().next()).collect();
    let path = "/v1/health/service/a%2Fb.c@d*e?dc=dc1&ns=team&partition=part&near=_agent&tag=blue&tag=prod";
    assert_eq!(lines[0], format!("GET {path} HTTP/1.1"));
    // No instance has the tags, so Consul is asked for the reason.
    assert_eq!(lines[1], "GET /v1/catalog/services?dc=dc1&ns=team&partition=part HTTP/1.1");
    assert_eq!(lines[2], format!("GET {path}&index=7&wait=30000ms HTTP/1.1"));
}

/// During an election a server may answer from incomplete data.
#[tokio::test]
async fn a_list_of_a_consul_without_a_leader_is_not_believed() {
    let leaderless = "X-Consul-Index: 8\r\nX-Consul-KnownLeader: false";
    let fake = Fake::start(
        consul_instance("X-Consul-Index: 7\r\nX-Consul-KnownLeader: true"),
        Answer::Bytes(http("200 OK", leaderless, "[]")),
    )
    .await;
    let web = Followed::new(&format!("consul://{}", fake.address), "web;80");
    let known = web.fails("Consul has no leader").await;
    assert_eq!(list(&known).unwrap(), ["10.0.0.1:80"]);
    assert_eq!(known.changes, 1);
}

/// Newer versions of Consul report when they left out what the token may not read.
#[tokio::test]
async fn what_consul_hides_from_our_token_is_not_taken_for_all_there_is() {
    let header = "X-Consul-Index: 7\r\nX-Consul-Results-Filtered-By-ACLs: true";
    let fake = Fake::start(Vec::new(), Answer::Bytes(http("200 OK", header, "[]"))).await;
    let web = Followed::new(&format!("consul://{}", fake.address), "web;80");
    assert_eq!(list(&web.fails("the token may not read").await), None);

    let fake = Fake::start(Vec::new(), Answer::Bytes(consul_instance(header))).await;
    let web = Followed::new(&format!("consul://{}", fake.address), "web;80");
    let known = web.sees(&["10.0.0.1:80"]).await;
    let reasons: Vec<_> = known.value.iter().flat_map(|value| &value.rejected).collect();
    assert_eq!(reasons.len(), 1);
    assert_eq!(reasons[0].reason, "the token may not read all instances");
}
