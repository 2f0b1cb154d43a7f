use super::*;

/// The events in the stream of changes, as JSON objects.
fn events(path: &std::path::Path) -> Result<Vec<serde_json::Value>> {
    let text = std::fs::read_to_string(path)?;
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    Ok(data.filter_map(|data| serde_json::from_str(data).ok()).collect())
}

/// Listens with forty connections. Reports how many are accepted, and what the others receive.
const LISTENERS: &str = "
import socket
held = [socket.create_connection(('127.0.0.1', 9990)) for _ in range(40)]
for one in held:
    one.sendall(b'GET /v1/events HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n')
answers = [one.recv(4096).decode() for one in held]
print(sum(' 200 ' in answer for answer in answers), 'may listen')
print([answer for answer in answers if ' 503 ' in answer])
";

#[test]
fn changes_are_told_as_they_happen_and_to_so_many() -> Result<()> {
    let host = Host::light()?;
    let blue = web(&host, "blue")?;
    // No program listens on its second port yet.
    let late = format!("{}:81", blue.ip()?);
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80").start()?;
    let checked = host.client("checked").env("BACKEND_C", "/services/c;82;check=tcp").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let path = host.dir().join("events");
    let listen = format!(
        "exec curl --silent --no-buffer http://127.0.0.1:9990/v1/events > {}",
        path.display()
    );
    let mut listener = host.command("sh");
    listener.args(["-c", &listen]);
    let _listener = host.spawn("listener", listener)?;
    let told = |event: &str, fields: &[(&str, &str)]| {
        testbed::eventually(WAIT, &format!("{event} with {fields:?}"), || {
            let all = events(&path)?;
            let fits = |told: &&serde_json::Value| {
                told["event"] == event && fields.iter().all(|(name, value)| told[*name] == *value)
            };
            let found = all.iter().find(fits).cloned();
            found.with_context(|| format!("{all:#?}"))
        })
    };
    // Events are sent only while a client listens.
    testbed::eventually(WAIT, "the listener to hear something", || {
        host.client("extra").env("BACKEND_E", "/services/blue;80").start()?.remove()?;
        ensure!(!events(&path)?.is_empty(), "nothing yet");
        Ok(())
    })?;
    let of_blue = [("service", "/services/blue"), ("query", "etcd /services/blue")];
    let added = told("route_added", &[&of_blue[..], &[("consumer", "extra")]].concat())?;
    assert_eq!(added["port"], 80, "{added}");
    assert!(added["address"].as_str().is_some_and(|ip| ip.starts_with("172.17.0.")), "{added}");
    assert_eq!(added["consumer_id"].as_str().map(str::len), Some(64), "{added}");

    offer_at(&host, "blue", &late)?;
    let changed = told("endpoints_changed", &of_blue)?;
    assert!(changed["endpoints"].as_array().is_some_and(|all| all.contains(&late.as_str().into())));
    let of_late = [&of_blue[..], &[("endpoint", &*late)]].concat();
    testbed::eventually(WAIT, "a connection to meet the dead endpoint", || {
        reaches(&app, "172.17.0.1:80", "blue")?;
        ensure!(embassy.log().contains("endpoint ejected"), "not yet");
        Ok(())
    })?;
    told("endpoint_ejected", &of_late)?;
    let _server =
        blue.spawn("server", ["testbed", "peer", "http", "--name", "late", "--port", "81"])?;
    testbed::eventually(WAIT * 2, "it to be back", || {
        reaches(&app, "172.17.0.1:80", "late")?;
        ensure!(embassy.log().contains("endpoint is back"), "not yet");
        Ok(())
    })?;
    told("endpoint_back", &of_late)?;

    // A passing check ends an ejection too. The first check runs within two seconds after the endpoint appears.
    let held = host.client("held").start()?;
    let checked_at = format!("{}:83", held.ip()?);
    host.etcd()?.v3().put("/services/c/1", &checked_at)?;
    testbed::eventually(WAIT, "the checked endpoint to be ejected", || {
        let _ = checked.get("172.17.0.1:82").run()?;
        ensure!(embassy.log().contains(&format!("endpoint ejected endpoint={checked_at}")), "no");
        Ok(())
    })?;
    let _server =
        held.spawn("server-2", ["testbed", "peer", "http", "--name", "c", "--port", "83"])?;
    told("endpoint_back", &[("service", "/services/c"), ("endpoint", &checked_at)])?;
    says(&embassy, &["endpoint is back", &checked_at])?;

    host.etcd_daemon().kill()?;
    told("source_lost", &[("source", "etcd /services/blue")])?;
    host.etcd_daemon().start()?;
    told("source_back", &[("source", "etcd /services/blue")])?;

    // One listener above the limit is refused, and the others stay connected.
    let mut many = host.command("/usr/bin/python3");
    many.args(["-c", LISTENERS]);
    let said = String::from_utf8(many.output()?.stdout)?;
    ensure!(
        said.contains("31 may listen") && said.contains("32 clients read events already"),
        "{said}"
    );
    told("route_removed", &[("consumer", "extra")])?;
    Ok(())
}
