//! UDP on the kernel path: real servers and clients, by connected sockets and by those that are not.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::{Container, Embassy, Host, Process, embassy_program};

use crate::{
    READY, WAIT,
    support::{ETCD, counts, metric, offer_at, reaches, says, web},
};

/// A server that answers each datagram with its name and the datagram.
const SERVER: &str = r#"
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", int(sys.argv[2])))
print("up", flush=True)
while True:
    text, who = s.recvfrom(2048)
    print("got", text.decode(), flush=True)
    s.sendto(sys.argv[1].encode() + b" " + text, who)
"#;

/// What the clients have in common. Each function says who answered, and from which address.
const CLIENT: &str = r#"
import errno, json, os, socket, sys, time
VIP = ("172.17.0.1", 53)
def unconnected(family=socket.AF_INET):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(5)
    return s
def ask(s, to, text=b"?"):
    try:
        s.sendto(text, to)
        said, who = s.recvfrom(2048)
    except socket.timeout:
        return ["timeout", None]
    except OSError as e:
        return [errno.errorcode.get(e.errno, str(e)), None]
    return [said.decode().split(" ")[0], list(who[:2])]
def connected(to=VIP, family=socket.AF_INET):
    s = unconnected(family)
    s.connect(to)
    return s
def ask_connected(s, text=b"?"):
    try:
        s.send(text)
        said = s.recv(2048)
    except socket.timeout:
        return ["timeout", None]
    except OSError as e:
        return [errno.errorcode.get(e.errno, str(e)), None]
    return [said.decode().split(" ")[0], list(s.getpeername()[:2])]
"#;

/// Runs a program after [`CLIENT`] in a container; it prints JSON.
fn python(app: &Container, program: &str) -> Result<Value> {
    let said = app.exec(["python3", "-c", &format!("{CLIENT}\n{program}")])?;
    serde_json::from_str(&said).with_context(|| format!("not JSON: {said:?}"))
}

/// A server on a port of a container, which runs until it is dropped.
fn serve(at: &Container, port: u16) -> Result<Process> {
    let words = ["python3", "-uc", SERVER, at.name()].map(str::to_owned);
    let name = format!("{}-{port}", at.name());
    let server = at.spawn(&name, words.into_iter().chain([port.to_string()]))?;
    testbed::eventually(WAIT, &format!("{name} to be up"), || {
        ensure!(server.log().contains("up"), "{}", server.log());
        Ok(())
    })?;
    Ok(server)
}

/// Servers on port 5353, which are the endpoints of the service `echo`.
fn servers(host: &Host, names: &[&str]) -> Result<Vec<(Container, Process)>> {
    let one = |name: &&str| {
        let container = host.client(name).start()?;
        let server = serve(&container, 5353)?;
        offer_at(host, "echo", &format!("{}:5353", container.ip()?))?;
        Ok((container, server))
    };
    names.iter().map(one).collect()
}

/// Waits until a consumer's UDP to a port takes a path.
fn takes(embassy: &Embassy, consumer: &str, port: u16, path: &str, reason: &str) -> Result<Value> {
    testbed::eventually(WAIT, &format!("{consumer}'s {port}/udp to take {path}"), || {
        let routes = embassy.admin(&format!("/v1/routes?consumer={consumer}"))?.json()?;
        let all = routes["items"].as_array().context("no list")?;
        let is_it = |route: &&Value| route["port"] == port && route["protocol"] == "udp";
        let route = all.iter().find(is_it).context("no such route")?;
        ensure!(route["path"] == path && route["path_reason"] == reason, "{route}");
        Ok(route.clone())
    })
}

/// Waits until a service has so many endpoints.
fn has_endpoints(embassy: &Embassy, consumer: &str, port: u16, number: u64) -> Result<()> {
    testbed::eventually(WAIT, &format!("{number} endpoints"), || {
        let route = takes(embassy, consumer, port, "kernel", "possible")?;
        ensure!(route["endpoints"] == number, "{route}");
        Ok(())
    })
}

fn deregister(host: &Host, at: &Container) -> Result<()> {
    host.etcd()?.v3().delete(&format!("/services/echo/{}:5353", at.ip()?))
}

fn of_route(name: &str, service: &str, port: u16) -> String {
    format!(
        "embassy_route_{name}{{consumer=\"app\",service=\"/services/{service}\",port=\"{port}\",protocol=\"udp\""
    )
}

#[test]
fn sockets_of_both_kinds_are_spread_evenly_and_answers_bear_the_vip() -> Result<()> {
    let host = Host::light()?;
    let _servers = servers(&host, &["one", "two", "three"])?;
    let app = host.client("app").env("BACKEND_ECHO", "/services/echo;53/udp").start()?;
    let stranger = host.client("stranger").start()?;
    // A binding of UDP asks for the kernel path by itself.
    let embassy = host.embassy(["--dnat", ETCD, "--connection-log=all"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 53, "kernel", "possible")?;
    let waited = host.embassy_command(["wait", "/services/echo", "--timeout=0"])?.output()?;
    let text = String::from_utf8(waited.stdout)?;
    assert!(waited.status.success(), "{text}");
    assert!(text.contains("not known: whether the endpoints of") && text.contains("UDP"), "{text}");
    let said = python(
        &app,
        r#"
all = {"connected": [ask_connected(connected()) for _ in range(30)],
       "unconnected": [ask(unconnected(), VIP) for _ in range(30)]}
s = unconnected()
all["one socket"] = [ask(s, VIP) for _ in range(9)]
s = connected()
again = [ask_connected(s)]
for _ in range(2):
    s.connect(VIP)
    again.append(ask_connected(s))
all["again"] = again
six = socket.AF_INET6
mapped = ("::ffff:172.17.0.1", 53)
all["mapped"] = [ask(unconnected(six), mapped), ask_connected(connected(mapped, six))]
all["undeclared"] = [ask_connected(connected(("172.17.0.1", 54))), ask(connected(("172.17.0.1", 54)), ("172.17.0.1", 54))]
t = socket.socket()
all["tcp"] = errno.errorcode[t.connect_ex(VIP)]
print(json.dumps(all))
"#,
    )?;
    let from = |way: &str| {
        let all = said[way].as_array().cloned().unwrap_or_default();
        let names = all.iter().map(|one| one[0].as_str().unwrap_or_default().to_owned());
        names.collect::<Vec<_>>()
    };
    let vip = json!(["172.17.0.1", 53]);
    for way in ["connected", "unconnected", "one socket", "again"] {
        for one in said[way].as_array().context(way.to_owned())? {
            assert_eq!(one[1], vip, "{way}: {said}");
        }
    }
    for way in ["connected", "unconnected"] {
        for name in ["one", "two", "three"] {
            let number = from(way).iter().filter(|from| *from == name).count();
            assert_eq!(number, 10, "{way}: {said}");
        }
    }
    let one = from("one socket");
    assert!(one.iter().all(|from| *from == one[0]), "{said}");
    let mut again = from("again");
    again.sort();
    assert_eq!(again, ["one", "three", "two"], "each connect() is a new choice: {said}");
    for one in said["mapped"].as_array().context("mapped")? {
        assert_eq!(one[1], json!(["::ffff:172.17.0.1", 53]), "{said}");
    }
    for one in said["undeclared"].as_array().context("undeclared")? {
        assert_eq!(one[0], "ECONNREFUSED", "{said}");
    }
    assert_eq!(said["tcp"], "ECONNREFUSED", "no rule captures the port of UDP: {said}");
    let said = python(&stranger, "print(json.dumps(ask_connected(connected())))")?;
    assert_eq!(said[0], "ECONNREFUSED", "nobody but the consumer is served: {said}");

    // 30 connected, 30 not, one that sent nine times, three connects of one socket, two of IPv6.
    counts(
        &embassy,
        &format!("{},outcome=\"closed\"}}", of_route("connections_total", "echo", 53)),
        66,
    )?;
    let started = format!("{}}}", of_route("connections_started_total", "echo", 53));
    assert_eq!(metric(&embassy, &started)?, 66);
    let active = format!("{}}} 0", of_route("connections_active", "echo", 53));
    ensure!(embassy.admin("/metrics")?.ok()?.contains(&active), "no {active}");
    // What connected sockets send runs no program; recv() asks for no address.
    let datagrams = |direction: &str| {
        metric(
            &embassy,
            &format!("{},direction=\"{direction}\"}}", of_route("datagrams_total", "echo", 53)),
        )
    };
    assert_eq!((datagrams("up")?, datagrams("down")?), (40, 40));
    says(
        &embassy,
        &["connection", "app", "protocol=\"udp\"", "datagrams_up=9", "datagrams_down=9"],
    )?;
    says(
        &embassy,
        &["connection", "path=\"kernel\"", "destination=172.17.0.1:53", "outcome=\"closed\""],
    )?;
    let embassy_program = embassy_program()?;
    let program = embassy_program.to_str().context("a path")?;
    let shown = host.run(program, ["ps"])?;
    ensure!(
        shown.contains("53/udp") && shown.contains("kernel") && shown.contains("40 dg"),
        "{shown}"
    );
    let shown = host.run(program, ["explain", "app", "53"])?;
    ensure!(shown.contains("path       kernel, UDP from 172.17.0."), "{shown}");
    ensure!(shown.contains("captured   yes"), "{shown}");
    let rules = host.run("nft", ["list", "table", "inet", "embassy"])?;
    ensure!(!rules.contains(". 53"), "{rules}");
    Ok(())
}

#[test]
fn an_endpoint_that_goes_is_left_by_the_next_datagram_and_by_the_next_connect() -> Result<()> {
    let host = Host::light()?;
    let servers = servers(&host, &["one", "two"])?;
    let app = host.client("app").env("BACKEND_ECHO", "/services/echo;53/udp").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--empty-hold=0"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 53, "kernel", "possible")?;
    // Asks with the same sockets whenever it is told to.
    let client = app.spawn(
        "asks",
        [
            "python3",
            "-uc",
            &format!(
                r#"{CLIENT}
import glob
s, c = unconnected(), connected()
for n in range(100):
    while not os.path.exists("{dir}/ask-%d" % n):
        time.sleep(0.01)
    if n == 2 or n == 5:
        try:
            c.connect(VIP)
        except OSError as e:
            print("failed", n, errno.errorcode[e.errno], flush=True)
    print("said", n, json.dumps([ask(s, VIP), ask_connected(c)]), flush=True)
"#,
                dir = host.dir().display()
            ),
        ],
    )?;
    let asks = |n: usize| -> Result<Value> {
        std::fs::write(host.dir().join(format!("ask-{n}")), "")?;
        testbed::eventually(WAIT, "an answer", || {
            let log = client.log();
            let said = log.lines().find_map(|line| line.strip_prefix(&format!("said {n} ")));
            Ok(serde_json::from_str(said.with_context(|| log.clone())?)?)
        })
    };
    let vip = json!(["172.17.0.1", 53]);
    let first = asks(0)?;
    assert_eq!((&first[0][1], &first[1][1]), (&vip, &vip), "{first}");
    // They got one each, in turn. The one of the unconnected socket goes.
    let of = |said: &Value, n: usize| said[n][0].as_str().unwrap_or_default().to_owned();
    assert_ne!(of(&first, 0), of(&first, 1), "{first}");
    // That of the connected socket: it talks to it until it connects again, as any client does whose address has gone.
    let gone = servers.iter().find(|(at, _)| at.name() == of(&first, 1)).context("one")?;
    let stays = servers.iter().find(|(at, _)| at.name() == of(&first, 0)).context("one")?;
    deregister(&host, &gone.0)?;
    has_endpoints(&embassy, "app", 53, 1)?;
    let said = asks(1)?;
    assert_eq!((of(&said, 0), of(&said, 1)), (of(&first, 0), of(&first, 1)), "{said}");
    let said = asks(2)?;
    assert_eq!(of(&said, 1), of(&first, 0), "connected again: {said}");
    offer_at(&host, "echo", &format!("{}:5353", gone.0.ip()?))?;
    has_endpoints(&embassy, "app", 53, 2)?;
    let said = asks(3)?;
    assert_eq!(of(&said, 0), of(&first, 0), "who has an endpoint keeps it: {said}");
    deregister(&host, &stays.0)?;
    has_endpoints(&embassy, "app", 53, 1)?;
    let said = asks(4)?;
    assert_eq!((of(&said, 0), &said[0][1]), (of(&first, 1), &vip), "the next datagram: {said}");

    // Nobody is left: the call fails at once, and is counted.
    deregister(&host, &gone.0)?;
    has_endpoints(&embassy, "app", 53, 0)?;
    let said = asks(5)?;
    assert_eq!(said[0][0], "ECONNREFUSED", "{said}");
    // A connect() that fails leaves the socket as it was.
    ensure!(client.log().contains("failed 5 ECONNREFUSED"), "{}", client.log());
    assert_eq!((of(&said, 1), &said[1][1]), (of(&first, 0), &vip), "{said}");
    let said = python(
        &app,
        r#"
s = unconnected()
start = time.monotonic()
all = [ask(s, VIP)]
try:
    connected()
    all.append("connected")
except OSError as e:
    all.append(errno.errorcode[e.errno])
all.append(time.monotonic() - start < 4)
print(json.dumps(all))
"#,
    )?;
    assert_eq!(said, json!([["ECONNREFUSED", null], "ECONNREFUSED", true]));
    let refused =
        format!("{},outcome=\"no_endpoint\"}}", of_route("connections_total", "echo", 53));
    counts(&embassy, &refused, 4)?;
    assert_eq!(metric(&embassy, &refused)?, 4);
    assert_eq!(metric(&embassy, "embassy_udp_events_total{event=\"no_endpoint\"}")?, 4);
    let route = takes(&embassy, "app", 53, "kernel", "possible")?;
    assert_eq!(route["state"], "no_endpoint", "{route}");
    offer_at(&host, "echo", &format!("{}:5353", gone.0.ip()?))?;
    has_endpoints(&embassy, "app", 53, 1)?;
    let said = asks(6)?;
    assert_eq!(of(&said, 0), of(&first, 1), "{said}");
    Ok(())
}

#[test]
fn one_socket_talks_to_several_services_and_each_answer_bears_its_own_vip_and_port() -> Result<()> {
    let host = Host::light()?;
    let mut all = Vec::new();
    for name in ["red", "green", "blue"] {
        let at = host.client(name).start()?;
        all.push(serve(&at, 5353)?);
        offer_at(&host, name, &format!("{}:5353", at.ip()?))?;
        // The service that has all of them.
        offer_at(&host, "any", &format!("{}:5353", at.ip()?))?;
        all.push(serve(&at, 5400)?);
        for port in 5400..5400 + 12 {
            if port > 5400 && name == "red" {
                all.push(serve(&at, port)?);
            }
        }
        if name == "red" {
            for n in 0..12 {
                offer_at(&host, &format!("many-{n}"), &format!("{}:{}", at.ip()?, 5400 + n))?;
            }
        }
    }
    let mut app = host
        .client("app")
        .env("BACKEND_R", "/services/red;1001/udp")
        .env("BACKEND_G", "/services/green;1002/udp")
        .env("BACKEND_B", "/services/blue;1003/udp")
        .env("BACKEND_ANY", "/services/any;1004/udp")
        .env("BACKEND_RED_AGAIN", "/services/red;1005/udp");
    for n in 0..12 {
        app = app.env(&format!("BACKEND_M{n}"), &format!("/services/many-{n};{}/udp", 1100 + n));
    }
    let app = app.start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    for port in (1001..=1005).chain(1100..1112) {
        takes(&embassy, "app", port, "kernel", "possible")?;
    }
    let said = python(
        &app,
        r#"
all = {}
s = unconnected()
at = lambda port: ("172.17.0.1", port)
all["three"] = [ask(s, at(port)) for _ in range(3) for port in (1001, 1002, 1003)]
# All three at once: the answers come in any order.
for port in (1001, 1002, 1003):
    s.sendto(b"x", at(port))
all["at once"] = sorted([said.decode().split(" ")[0], who[1]] for said, who in (s.recvfrom(99) for _ in range(3)))
# All of the endpoints of this service are in use for others.
all["any"] = ask(s, at(1004))
all["red"] = ask(s, at(1001))
# Another socket: the endpoint of `any` is not one that it has.
other = unconnected()
all["two"] = [ask(other, at(1001)), ask(other, at(1004)), ask(other, at(1001)), ask(other, at(1004))]
# One endpoint for two ports cannot be told apart: the last one counts.
both = unconnected()
all["both"] = [ask(both, at(1001)), ask(both, at(1005)), ask(both, at(1001))]
many = unconnected()
all["many"] = [ask(many, at(1100 + n % 12)) for n in range(36)]
print(json.dumps(all))
"#,
    )?;
    let at = |name: &str, port: u16| json!([name, ["172.17.0.1", port]]);
    let three = [at("red", 1001), at("green", 1002), at("blue", 1003)];
    let expected: Vec<_> = three.iter().cycle().take(9).cloned().collect();
    assert_eq!(said["three"], json!(expected), "{said}");
    assert_eq!(said["at once"], json!([["blue", 1003], ["green", 1002], ["red", 1001]]), "{said}");
    assert_eq!(said["any"][1], json!(["172.17.0.1", 1004]), "{said}");
    assert_eq!(said["red"], at("red", 1001), "{said}");
    assert_eq!(said["two"][0], at("red", 1001), "{said}");
    assert_ne!(said["two"][1][0], "red", "{said}");
    assert_eq!(said["two"][1][1], json!(["172.17.0.1", 1004]), "{said}");
    assert_eq!((&said["two"][2], &said["two"][3]), (&said["two"][0], &said["two"][1]), "{said}");
    assert_eq!(said["both"], json!([at("red", 1001), at("red", 1005), at("red", 1001)]), "{said}");
    let expected: Vec<_> = (0..36).map(|n| at("red", 1100 + n % 12)).collect();
    assert_eq!(said["many"], json!(expected), "{said}");
    let event =
        |event: &str| metric(&embassy, &format!("embassy_udp_events_total{{event=\"{event}\"}}"));
    embassy.admin("/v1/routes")?.json()?;
    assert!(event("shared")? >= 2, "{}", event("shared")?);
    // Twelve services in eight places: each of the later ones took another's.
    assert_eq!(event("evicted")?, 28);
    assert_eq!((event("no_endpoint")?, event("no_place")?), (0, 0));
    Ok(())
}

#[test]
fn a_consumer_gets_its_own_service_and_after_its_end_none() -> Result<()> {
    let host = Host::light()?;
    let mut all = Vec::new();
    for name in ["red", "blue"] {
        let at = host.client(name).start()?;
        all.push(serve(&at, 5353)?);
        offer_at(&host, name, &format!("{}:5353", at.ip()?))?;
    }
    let asks = |name: &str, service: &str| {
        host.client(name).env("BACKEND_X", &format!("/services/{service};53/udp")).start()
    };
    let (app, other) = (asks("app", "red")?, asks("other", "blue")?);
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    for consumer in ["app", "other"] {
        takes(&embassy, consumer, 53, "kernel", "possible")?;
    }
    for (consumer, service) in [(&app, "red"), (&other, "blue")] {
        let said = python(
            consumer,
            "print(json.dumps([ask(unconnected(), VIP), ask_connected(connected())]))",
        )?;
        let expected = json!([service, ["172.17.0.1", 53]]);
        assert_eq!(said, json!([expected, expected]));
    }
    // Its process lives on, with a socket that has a choice already.
    let client = app.spawn(
        "lives-on",
        [
            "python3",
            "-uc",
            &format!(
                r#"{CLIENT}
s = unconnected()
print("first", json.dumps(ask(s, VIP)), flush=True)
s.settimeout(0.3)
while ask(s, VIP)[0] == "red":
    time.sleep(0.05)
print("last", json.dumps([ask(s, VIP), ask_connected(connected())]), flush=True)
"#
            ),
        ],
    )?;
    testbed::eventually(WAIT, "a first answer", || {
        ensure!(client.log().contains("first [\"red\""), "{}", client.log());
        Ok(())
    })?;
    let engine = host.fake_engine().context("a light host")?;
    engine.has_not(app.id());
    engine.tells("die", app.id());
    testbed::eventually(WAIT, "the end of its route", || {
        let log = client.log();
        let last = log.lines().find_map(|line| line.strip_prefix("last "));
        let last: Value = serde_json::from_str(last.with_context(|| log.clone())?)?;
        // An unconnected socket is not told that nobody is there.
        ensure!(last == json!([["timeout", null], ["ECONNREFUSED", null]]), "{last}");
        Ok(())
    })?;
    let said = python(&other, "print(json.dumps(ask(unconnected(), VIP)))")?;
    assert_eq!(said, json!(["blue", ["172.17.0.1", 53]]));
    Ok(())
}

/// A socket may be handed to another container, and may be used by many threads.
#[test]
fn who_sends_decides_whatever_socket_it_has_and_however_many_threads_send() -> Result<()> {
    let host = Host::light()?;
    let mut all = Vec::new();
    for name in ["red", "green", "blue"] {
        let at = host.client(name).start()?;
        all.push(serve(&at, 5353)?);
        offer_at(&host, name, &format!("{}:5353", at.ip()?))?;
    }
    let app = host
        .client("app")
        .env("BACKEND_R", "/services/red;53/udp")
        .env("BACKEND_G", "/services/green;54/udp")
        .env("BACKEND_B", "/services/blue;55/udp")
        .start()?;
    let other = host.client("other").env("BACKEND_X", "/services/blue;53/udp").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    for port in [53, 54, 55] {
        takes(&embassy, "app", port, "kernel", "possible")?;
    }
    takes(&embassy, "other", 53, "kernel", "possible")?;
    let path = host.dir().join("handed");
    let gives = app.spawn(
        "gives",
        [
            "python3",
            "-uc",
            &format!(
                r#"{CLIENT}
at = socket.socket(socket.AF_UNIX)
at.bind("{path}")
at.listen()
s = unconnected()
print("before", json.dumps(ask(s, VIP)), flush=True)
conn = at.accept()[0]
socket.send_fds(conn, [b"x"], [s.fileno()])
conn.recv(1)
print("after", json.dumps(ask(s, VIP)), flush=True)
"#,
                path = path.display()
            ),
        ],
    )?;
    testbed::eventually(WAIT, "a first answer", || {
        ensure!(gives.log().contains("before [\"red\""), "{}", gives.log());
        Ok(())
    })?;
    let said = python(
        &other,
        &format!(
            r#"
conn = socket.socket(socket.AF_UNIX)
conn.connect("{path}")
_, fds, _, _ = socket.recv_fds(conn, 1, 1)
s = socket.socket(fileno=fds[0])
s.settimeout(5)
all = [ask(s, VIP), ask(s, VIP)]
conn.send(b"x")
print(json.dumps(all))
"#,
            path = path.display()
        ),
    )?;
    let blue = json!(["blue", ["172.17.0.1", 53]]);
    assert_eq!(said, json!([blue, blue]));
    testbed::eventually(WAIT, "an answer to the first owner", || {
        ensure!(gives.log().contains("after [\"red\", [\"172.17.0.1\", 53]]"), "{}", gives.log());
        Ok(())
    })?;

    let before = metric(&embassy, "embassy_connections_started_total")?;
    let said = python(
        &app,
        r#"
import threading
expected = {53: b"red", 54: b"green", 55: b"blue"}
wrong, right = [], []
for _ in range(20):
    s = unconnected()
    start = threading.Barrier(6)
    def send(n):
        start.wait()
        for k in range(5):
            try:
                s.sendto(b"x", ("172.17.0.1", 53 + (n + k) % 3))
            except OSError as e:
                wrong.append(str(e))
    threads = [threading.Thread(target=send, args=(n,)) for n in range(6)]
    [t.start() for t in threads]
    for _ in range(30):
        text, who = s.recvfrom(99)
        (right if text.split(b" ")[0] == expected.get(who[1]) and who[0] == "172.17.0.1" else wrong).append(str([text, who]))
    [t.join() for t in threads]
    s.close()
print(json.dumps([wrong, len(right)]))
"#,
    )?;
    assert_eq!(said, json!([[], 600]));
    // Each flow that began has ended, and no place was missed.
    let flows = metric(&embassy, "embassy_connections_started_total")? - before;
    ensure!((60..=120).contains(&flows), "{flows}");
    for (service, port) in [("red", 53), ("green", 54), ("blue", 55)] {
        let active = format!("{}}} 0", of_route("connections_active", service, port));
        ensure!(embassy.admin("/metrics")?.ok()?.contains(&active), "no {active}");
    }
    assert_eq!(metric(&embassy, "embassy_udp_events_total{event=\"no_place\"}")?, 0);
    Ok(())
}

#[test]
fn a_drained_endpoint_is_left_by_the_next_datagram_and_an_ejected_one_is_the_last_resort()
-> Result<()> {
    let host = Host::light()?;
    let servers = servers(&host, &["one", "two"])?;
    let app = host.client("app").env("BACKEND_ECHO", "/services/echo;53/udp;check=tcp").start()?;
    let token = host.dir().join("token");
    std::fs::write(&token, "secret")?;
    let embassy =
        host.embassy(["--dnat", ETCD, &format!("--admin-token-file={}", token.display())])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 53, "kernel", "possible")?;
    let drain = |n: usize, drained: bool| {
        let body = format!(
            r#"{{"service":"/services/echo","endpoint":"{}:5353","drained":{drained}}}"#,
            servers[n].0.ip()?
        );
        host.run(
            "curl",
            [
                "-sSf",
                "-X",
                "PUT",
                "-H",
                "Authorization: Bearer secret",
                "-H",
                "Content-Type: application/json",
                "--data",
                &body,
                "http://127.0.0.1:9990/v1/endpoints/drain",
            ],
        )
    };
    // Nothing listens on TCP: both are unhealthy, and both are used. Flows of UDP do not change that, as is seen at the end.
    testbed::eventually(WAIT, "the checks to fail", || {
        let endpoints = embassy.admin("/v1/endpoints")?.json()?;
        let all = endpoints["items"].as_array().context("no list")?;
        ensure!(all.iter().all(|one| one["state"] == "unhealthy"), "{endpoints}");
        Ok(())
    })?;
    let ask = "print(json.dumps(sorted(ask(unconnected(), VIP)[0] for _ in range(4))))";
    testbed::eventually(WAIT, "both to be used", || {
        let said = python(&app, ask)?;
        ensure!(said == json!(["one", "one", "two", "two"]), "{said}");
        Ok(())
    })?;
    drain(0, true)?;
    testbed::eventually(WAIT, "the other one to be used alone", || {
        let said = python(&app, ask)?;
        ensure!(said == json!(["two", "two", "two", "two"]), "{said}");
        Ok(())
    })?;
    let client = app.spawn(
        "asks",
        [
            "python3",
            "-uc",
            &format!(
                r#"{CLIENT}
s = unconnected()
while True:
    print("said", ask(s, VIP)[0], flush=True)
    time.sleep(0.05)
"#
            ),
        ],
    )?;
    let last = |expected: &str| {
        testbed::eventually(WAIT, &format!("{expected} to answer"), || {
            let log = client.log();
            let last = log.lines().filter_map(|line| line.strip_prefix("said ")).next_back();
            ensure!(last == Some(expected), "{last:?}");
            Ok(())
        })
    };
    last("two")?;
    drain(0, false)?;
    drain(1, true)?;
    last("one")?;
    drain(0, true)?;
    last("ECONNREFUSED")?;
    ensure!(!embassy.log().contains("endpoint check passes"), "{}", embassy.log());
    Ok(())
}

/// Both families, with a real engine.
#[test]
fn a_container_of_docker_reaches_by_each_family_the_endpoints_of_it() -> Result<()> {
    let host = Host::builder().ipv6(true).start()?;
    let four = host.client("four").start()?;
    let six = host.client("six").start()?;
    let mut running = Vec::new();
    for (at, family) in [(&four, "AF_INET"), (&six, "AF_INET6")] {
        let mut command = at.command("python3")?;
        command.args(["-uc", &SERVER.replace("AF_INET", family), at.name(), "5353"]);
        running.push(host.spawn(&format!("{}-serves", at.name()), command)?);
    }
    for server in &running {
        testbed::eventually(WAIT, "a server", || {
            ensure!(server.log().contains("up"), "{}", server.log());
            Ok(())
        })?;
    }
    offer_at(&host, "mixed", &format!("{}:5353", four.ip()?))?;
    offer_at(&host, "mixed", &format!("[{}]:5353", six.ip6()?))?;
    offer_at(&host, "four", &format!("{}:5353", four.ip()?))?;
    let app = host
        .client("app")
        .env("BACKEND_MIXED", "/services/mixed;53/udp")
        .env("BACKEND_FOUR", "/services/four;54/udp")
        .start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    testbed::eventually(WAIT, "the paths", || {
        let routes = embassy.admin("/v1/routes?consumer=app")?.json()?;
        let all = routes["items"].as_array().context("no list")?;
        let mut paths: Vec<_> = all
            .iter()
            .map(|route| {
                let is_six = route["address"].as_str().is_some_and(|it| it.contains(':'));
                let word = |name: &str| route[name].as_str().unwrap_or_default().to_owned();
                (route["port"].as_u64(), is_six, word("path_reason"), word("state"))
            })
            .collect();
        paths.sort();
        let expected = [
            (53, false, "possible", "ok"),
            (53, true, "possible", "ok"),
            (54, false, "possible", "ok"),
            (54, true, "family", "degraded"),
        ];
        let expected = expected.map(|(port, is_six, reason, state)| {
            (Some(port), is_six, reason.to_owned(), state.to_owned())
        });
        ensure!(paths == expected, "{paths:?}");
        Ok(())
    })?;
    // The image has no Python: a process of the host joins the container's network and control group.
    let (pid, program) = (
        app.pid()?,
        format!(
            r#"{CLIENT}
six = socket.AF_INET6
to = ("fd00:d0c::1", 53)
all = {{"four": [ask(unconnected(), VIP) for _ in range(3)] + [ask_connected(connected()) for _ in range(3)],
       "six": [ask(unconnected(six), to) for _ in range(3)] + [ask_connected(connected(to, six)) for _ in range(3)],
       "mapped": [ask(unconnected(six), ("::ffff:172.17.0.1", 53)), ask_connected(connected(("::ffff:172.17.0.1", 53), six))]}}
print(json.dumps(all))
"#
        ),
    );
    let join = format!(
        "echo 0 > /sys/fs/cgroup/unified$(sed -n 's/^0:://p' /proc/{pid}/cgroup)/cgroup.procs; exec nsenter --target={pid} --net -- \"$@\""
    );
    let said = host.run("sh", ["-ec", &join, "sh", "python3", "-c", &program])?;
    let said: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
    let of = |name: &str, vip: &str, times: usize| json!(vec![json!([name, [vip, 53]]); times]);
    assert_eq!(said["four"], of("four", "172.17.0.1", 6), "{said}");
    assert_eq!(said["six"], of("six", "fd00:d0c::1", 6), "{said}");
    assert_eq!(said["mapped"], of("four", "::ffff:172.17.0.1", 2), "{said}");
    Ok(())
}

/// embassy as another user, with these capabilities alone.
fn with_capabilities(host: &Host, capabilities: &str) -> Result<Embassy> {
    let sets = format!("-all,{capabilities}");
    let mut command = host.command("setpriv");
    command.args(["--reuid=59990", "--regid=59990", "--clear-groups"]);
    command.arg(format!("--bounding-set={sets}"));
    command.arg(format!("--inh-caps={sets}")).arg(format!("--ambient-caps={sets}"));
    command.arg(embassy_program()?).args(["--dnat", ETCD, "--state-dir=off"]);
    command.env("DOCKER_HOST", host.docker_url());
    let socket = host.docker_url();
    host.run("chmod", ["0666", socket.strip_prefix("unix://").context("no socket")?])?;
    host.embassy_from(command)
}

#[test]
fn without_the_kernel_path_a_binding_of_udp_is_refused_with_its_reason() -> Result<()> {
    let host = Host::light()?;
    let _servers = servers(&host, &["one"])?;
    let web = web(&host, "web")?;
    let app = host
        .client("app")
        .env("BACKEND_ECHO", "/services/echo;53/udp")
        .env("BACKEND_WEB", "/services/web;80")
        .env("BACKEND_WRONG", "/services/echo;54/udp;path=proxy")
        .start()?;
    let embassy = with_capabilities(&host, "+net_admin")?;
    embassy.wait_ready(READY)?;
    let route = takes(&embassy, "app", 53, "none", "unavailable")?;
    assert_eq!((&route["state"], &route["verdict"]), (&json!("not_captured"), &json!("broken")));
    reaches(&app, "172.17.0.1:80", web.name())?;
    let said = python(&app, "print(json.dumps(ask_connected(connected())))")?;
    assert_eq!(said[0], "ECONNREFUSED", "{said}");
    says(&embassy, &["UDP binding is not served", "consumer=app", "port=53"])?;
    says(&embassy, &["binding skipped", "BACKEND_WRONG", "path=proxy: cannot be used with /udp"])?;
    let path = format!("{},path=\"none\"}} 1", of_route("path", "echo", 53));
    let scraped = embassy.admin("/metrics")?.ok()?;
    ensure!(scraped.contains(&path), "no {path} in {scraped}");
    assert_eq!(metric(&embassy, "embassy_bindings_invalid")?, 1);
    let program = embassy_program()?;
    let program = program.to_str().context("a path")?;
    let explained = embassy.admin("/v1/explain?consumer=app&port=53")?.json()?;
    assert_eq!((&explained["verdict"], &explained["captured"]), (&json!("broken"), &json!(false)));
    let finding = &explained["findings"][0];
    assert_eq!(finding["cause"], "no_path", "{explained}");
    let status = embassy.admin("/v1/status")?.json()?;
    let findings = status["findings"].as_array().context("findings")?;
    ensure!(findings.iter().any(|finding| finding["cause"] == "no_path"), "{status}");
    assert_eq!(status["ready"], true, "{status}");
    let shown = host.run(program, ["ps"])?;
    ensure!(shown.contains("53/udp") && shown.contains("none"), "{shown}");
    drop(embassy);

    // With the second capability alone it is served.
    let embassy = with_capabilities(&host, "+bpf,+net_admin")?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 53, "kernel", "possible")?;
    let said = python(&app, "print(json.dumps(ask(unconnected(), VIP)))")?;
    assert_eq!(said, json!(["one", ["172.17.0.1", 53]]));
    Ok(())
}

/// Resolvers drop an answer from another address than the one that they asked.
#[test]
fn real_resolvers_get_their_answers_and_follow_the_servers() -> Result<()> {
    let host = Host::light()?;
    let mut all = Vec::new();
    for (n, name) in ["dns-1", "dns-2"].iter().enumerate() {
        let at = host.client(name).start()?;
        let server = at.spawn(
            &format!("{name}-server"),
            [
                "/usr/sbin/dnsmasq".to_owned(),
                "--no-daemon".to_owned(),
                "--no-hosts".to_owned(),
                "--no-resolv".to_owned(),
                "--conf-file=/dev/null".to_owned(),
                "--pid-file=".to_owned(),
                "--user=root".to_owned(),
                // There is no other address of it.
                "--local=/name.test/".to_owned(),
                format!("--address=/name.test/192.0.2.{}", n + 1),
            ],
        )?;
        offer_at(&host, "dns", &format!("{}:53", at.ip()?))?;
        all.push((at, server));
    }
    let app = host
        .client("app")
        .env("BACKEND_DNS", "/services/dns;53/udp")
        .env("BACKEND_DNS_TCP", "/services/dns;53")
        .start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 53, "kernel", "possible")?;
    has_endpoints(&embassy, "app", 53, 2)?;
    let conf = host.dir().join("resolv.conf");
    std::fs::write(&conf, "nameserver 172.17.0.1\noptions timeout:2 attempts:3\n")?;
    let names = host.dir().join("nsswitch.conf");
    std::fs::write(&names, "hosts: dns\n")?;
    // glibc's own: a connected socket for each query.
    let glibc = format!(
        "mount --bind {} /etc/resolv.conf; mount --bind {} /etc/nsswitch.conf; getent ahostsv4 name.test",
        conf.display(),
        names.display()
    );
    let resolvers: &[(&str, Vec<String>)] = &[
        ("getent", ["unshare", "--mount", "sh", "-ec", &glibc].map(str::to_owned).to_vec()),
        (
            "dig",
            ["dig", "+short", "+tries=3", "@172.17.0.1", "name.test"].map(str::to_owned).to_vec(),
        ),
        (
            "dig by TCP",
            ["dig", "+short", "+tcp", "@172.17.0.1", "name.test"].map(str::to_owned).to_vec(),
        ),
        ("busybox", ["busybox", "nslookup", "name.test", "172.17.0.1"].map(str::to_owned).to_vec()),
    ];
    for (name, command) in resolvers {
        testbed::eventually(WAIT, &format!("{name} to hear of both"), || {
            let said = (0..2).map(|_| app.exec(command)).collect::<Result<Vec<_>>>()?.concat();
            ensure!(said.contains("192.0.2.1") && said.contains("192.0.2.2"), "{said}");
            Ok(())
        })?;
    }
    host.etcd()?.v3().delete(&format!("/services/dns/{}:53", all[0].0.ip()?))?;
    has_endpoints(&embassy, "app", 53, 1)?;
    // It is not only deregistered, but dead.
    let (_, server) = all.remove(0);
    drop(server);
    for (name, command) in resolvers {
        for _ in 0..2 {
            let said = app.exec(command)?;
            ensure!(said.contains("192.0.2.2") && !said.contains("192.0.2.1\n"), "{name}: {said}");
        }
    }
    Ok(())
}

/// What a call costs: `cargo test --test it figures_of_udp -- --ignored --nocapture`.
#[test]
#[ignore = "figures, no test"]
fn figures_of_udp() -> Result<()> {
    let host = Host::light()?;
    let at = host.client("sink").start()?;
    // It never reads: what does not fit is dropped.
    let sink = at.spawn(
        "sink",
        [
            "python3",
            "-uc",
            "import socket, time\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 5353)); print('up'); time.sleep(1000)",
        ],
    )?;
    testbed::eventually(WAIT, "a sink", || {
        ensure!(sink.log().contains("up"), "{}", sink.log());
        Ok(())
    })?;
    offer_at(&host, "echo", &format!("{}:5353", at.ip()?))?;
    let app = host.client("app").env("BACKEND_ECHO", "/services/echo;53/udp").start()?;
    let measure = |to: &str| -> Result<Value> {
        python(
            &app,
            &format!(
                r#"
to = {to}
def costs(call, n=100000):
    start = time.process_time()
    for _ in range(n):
        call()
    return round((time.process_time() - start) / n * 1e6, 2)
s = unconnected()
c = unconnected()
all = [[costs(lambda: s.sendto(b"x", to)), costs(lambda: c.connect(to))] for _ in range(5)]
print(json.dumps([sorted(one[k] for one in all)[2] for k in (0, 1)]))
"#
            ),
        )
    };
    let direct = format!("({:?}, 5353)", at.ip()?.to_string());
    println!("us of CPU time, sendto() and connect(), medians of 5 times 100,000:");
    println!("  no program attached, to the endpoint: {}", measure(&direct)?);
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 53, "kernel", "possible")?;
    println!("  attached, to the endpoint (no route): {}", measure(&direct)?);
    println!("  attached, to the VIP:                 {}", measure("VIP")?);
    Ok(())
}

/// As long as something is sent or received, the choice stays: `cargo test --test it after_a_minute -- --ignored`.
#[test]
#[ignore = "takes more than a minute"]
fn after_a_minute_of_silence_the_next_datagram_is_a_new_choice() -> Result<()> {
    let host = Host::light()?;
    let _servers = servers(&host, &["one", "two"])?;
    let app = host.client("app").env("BACKEND_ECHO", "/services/echo;53/udp").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 53, "kernel", "possible")?;
    let said = python(
        &app,
        r#"
silent, busy = unconnected(), unconnected()
all = [ask(silent, VIP)[0], ask(busy, VIP)[0]]
for _ in range(62):
    time.sleep(1)
    kept = ask(busy, VIP)[0] == all[1]
    if not kept:
        break
# The turn is the same as at the start, so that of the silent one is the next one's.
all += [kept, ask(unconnected(), VIP)[0], ask(silent, VIP)[0]]
print(json.dumps(all))
"#,
    )?;
    let (first, second) = (&said[0], &said[1]);
    assert_ne!(first, second, "{said}");
    assert_eq!(said, json!([first, second, true, first, second]), "a new choice, in turn");
    let ended = format!("{},outcome=\"closed\"}}", of_route("connections_total", "echo", 53));
    counts(&embassy, &ended, 4)?;
    assert_eq!(metric(&embassy, "embassy_udp_events_total{event=\"evicted\"}")?, 0);
    Ok(())
}
