use embassy::admin::api::{BindingState, Outcome, RouteState, SourceState, Verdict};

use super::*;
use crate::support::own_rules;

#[test]
fn it_tells_where_connections_go_and_what_they_moved() -> Result<()> {
    let host = Host::light()?;
    let blue = web(&host, "blue")?;
    let greeter = host.server("greeter", ["greet"]).start()?;
    offer_at(&host, "greeter", &format!("{}:80", greeter.ip()?))?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80");
    let app = app.env("BACKEND_GREETER", "/services/greeter;81");
    let app = app.env("BACKEND_WRONG", "no port").env("BACKEND_VIA", "x;82;via=consul").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    let bytes = app.get("172.17.0.1:80/bytes/100000").run()?;
    ensure!(bytes.answered() == 1, "{bytes:?}");

    let routes: api::Page<api::Route> = get(&embassy, "/v1/routes?service=/services/blue")?;
    assert_eq!((routes.total, routes.items.len()), (1, 1));
    let route = &routes.items[0];
    assert_eq!((&*route.consumer, &*route.consumer_id, route.port), ("app", app.id(), 80));
    assert_eq!(route.address, app.ip()?.to_string());
    assert_eq!((route.state, route.endpoints, route.usable), (RouteState::Ok, 1, 1));
    assert_eq!(route.query.name, "etcd /services/blue");
    let is_whole = |figures: &api::Figures| {
        figures.started >= 2
            && figures.active == 0
            && figures.errors == 0
            && figures.ended.get(&Outcome::Closed) == Some(&figures.started)
            && figures.connect.count == figures.started
            && figures.bytes_down > 100_000
            && figures.bytes_up > 50
            && figures.last_error.is_none()
    };
    let path = "/v1/routes?consumer=app&q=blue";
    let whole = becomes(&embassy, path, "figures of the route", |page: &api::Page<api::Route>| {
        page.items.iter().all(|route| is_whole(&route.figures))
    })?;
    let endpoints: api::Page<api::Endpoint> = get(&embassy, "/v1/endpoints?state=active")?;
    let endpoint = endpoints.items.iter().find(|e| e.service == "/services/blue").unwrap();
    assert_eq!(endpoint.endpoint, format!("{}:80", blue.ip()?));
    assert!(is_whole(&endpoint.figures), "{endpoint:#?}");
    assert_eq!(endpoint.figures.bytes_down, whole.items[0].figures.bytes_down);

    // The open connections, and their bytes so far.
    let held = hold(&app, "held", "172.17.0.1:81")?;
    let path = "/v1/connections?service=/services/greeter";
    let page = becomes(&embassy, path, "a connection", |page: &api::Page<api::Connection>| {
        page.items.iter().any(|live| live.connect_seconds.is_some() && live.bytes_down > 0)
    })?;
    let live = &page.items[0];
    assert_eq!((live.consumer.as_deref(), live.tries), (Some("app"), 1));
    assert_eq!(live.destination, "172.17.0.1:81");
    assert_eq!(live.endpoint, Some(format!("{}:80", greeter.ip()?)));
    assert!(live.connect_seconds < Some(live.age_seconds));
    // The consumer can be found by the address that the server sees and logs.
    let of_server = ["-H", "-t", "-n", "state", "established", "sport", "=", ":80"];
    let seen = testbed::output(greeter.command("ss")?.args(of_server))?;
    let local = live.local.clone().expect("it is open");
    let port = local.strip_prefix("172.17.0.1").expect("the bridge's address");
    let is_local = |word: &str| word.ends_with(&format!("172.17.0.1]{port}"));
    assert!(seen.split_whitespace().any(is_local), "{local}: {seen}");
    let found: api::Page<api::Connection> = get(&embassy, &format!("/v1/connections?q={local}"))?;
    assert_eq!(found.items.len(), 1);
    let routes: api::Page<api::Route> = get(&embassy, "/v1/routes?q=greeter")?;
    assert_eq!(routes.items[0].figures.active, 1);
    assert_eq!(routes.items[0].figures.bytes_down, live.bytes_down);
    held.kill()?;

    let bindings: api::Page<api::Binding> = get(&embassy, "/v1/bindings?state=problem")?;
    let problems: Vec<_> = bindings.items.iter().map(|b| (&*b.origin, b.state)).collect();
    assert_eq!(
        problems,
        [("BACKEND_VIA", BindingState::Unrouted), ("BACKEND_WRONG", BindingState::Invalid)]
    );
    assert!(bindings.items[0].reasons[0].contains("consul"), "{bindings:?}");

    let sources: api::Page<api::Source> = get(&embassy, "/v1/sources")?;
    let names: Vec<_> = sources.items.iter().map(|s| (&*s.name, s.state, s.items)).collect();
    let expected = [
        ("provider", SourceState::Up, 1),
        ("etcd /services/blue", SourceState::Up, 1),
        ("etcd /services/greeter", SourceState::Up, 1),
    ];
    assert_eq!(names, expected);

    let status: api::Status = get(&embassy, "/v1/status")?;
    assert!(status.ready && !status.may_change, "{status:?}");
    assert_eq!((status.routes, status.endpoints, status.problems), (2, 2, 2));
    assert_eq!((status.sources, status.sources_down, status.sources_waiting), (3, 0, 0));
    assert!(status.capture.in_place && status.capture.firewall.is_some(), "{status:?}");
    assert_eq!(status.vips, ["172.17.0.1"]);
    assert!(status.connections.started >= 3 && status.connections.bytes_down > 100_000);

    // The counts of a route live as long as the route, whatever happens to its endpoints.
    let another = host.web("another").start()?;
    host.etcd()?.v3().put("/services/blue/two", &format!("{}:80", another.ip()?))?;
    let path = "/v1/routes?q=blue";
    becomes(&embassy, path, "two endpoints", |page: &api::Page<api::Route>| {
        page.items[0].endpoints == 2
            && page.items[0].figures.started == whole.items[0].figures.started
    })?;
    Ok(())
}

#[test]
fn it_explains_from_symptom_to_cause() -> Result<()> {
    let host = Host::light()?;
    let blue = web(&host, "blue")?;
    // No program listens there.
    offer_at(&host, "half", &format!("{}:80", blue.ip()?))?;
    offer_at(&host, "half", &format!("{}:81", blue.ip()?))?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80");
    let app = app.env("BACKEND_HALF", "/services/half;81").env("BACKEND_NONE", "/services/none;82");
    let app = app.start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    let explain = |who: &str, port: u16| -> Result<api::Explain> {
        get(&embassy, &format!("/v1/explain?consumer={who}&port={port}"))
    };
    let says_of = |explain: &api::Explain, words: &str| {
        assert!(explain.findings.iter().any(|one| one.text.contains(words)), "{explain:#?}");
    };

    let endpoint = format!("{}:80", blue.ip()?);
    for who in ["app", &app.id()[..12], &app.ip()?.to_string()] {
        let good = explain(who, 80)?;
        assert_eq!((good.verdict, good.captured), (Verdict::Ok, Some(true)), "{good:#?}");
        assert_eq!(good.services[0].next.as_ref(), Some(&endpoint));
        assert_eq!(good.bindings[0].origin, "BACKEND_BLUE");
        let source = good.services[0].source.as_ref().map(|source| &*source.name);
        assert_eq!(source, Some("etcd /services/blue"));
        says_of(&good, &format!("goes to {endpoint}"));
    }

    // Explaining does not pick an endpoint: only a real connection meets the one without a listener.
    let answers = app.get("172.17.0.1:81").times(4).run()?;
    ensure!(answers.answered() == 4, "{answers:?}");
    says(&embassy, &["endpoint ejected", "refused"])?;
    let half = explain("app", 81)?;
    assert_eq!(half.verdict, Verdict::Degraded, "{half:#?}");
    let dead = half.services[0].endpoints.iter().find(|e| e.endpoint.ends_with(":81")).unwrap();
    assert!(dead.health.ejections >= 1 && dead.health.failures >= 1, "{dead:#?}");
    assert!(dead.figures.last_error.as_ref().is_some_and(|e| e.text.contains("refused")));
    says_of(&half, "refused");

    let none = explain("app", 82)?;
    assert_eq!((none.verdict, none.services[0].next.as_ref()), (Verdict::Broken, None));
    says_of(&none, "has no endpoint");
    let undeclared = explain("app", 83)?;
    assert_eq!((undeclared.verdict, undeclared.captured), (Verdict::Broken, Some(false)));
    says_of(&undeclared, "Port 83 is not declared by app (declared: 80, 81, 82); not captured");
    let nobody = explain("nobody", 80)?;
    assert_eq!(nobody.verdict, Verdict::Broken);
    says_of(&nobody, "\"nobody\"");

    // A source that is down is reported, and its last answer is used.
    host.etcd_daemon().kill()?;
    let path = "/v1/explain?consumer=app&port=80";
    becomes(&embassy, path, "the source to be down", |explain: &api::Explain| {
        explain.verdict == Verdict::Degraded
            && explain.services[0].next.as_ref() == Some(&endpoint)
            && explain.findings.iter().any(|one| one.text.contains("does not answer"))
    })?;
    Ok(())
}

#[test]
fn a_source_that_is_still_awaited_neither_answers_nor_is_down() -> Result<()> {
    let host = Host::light()?;
    let _app = host.client("app").env("BACKEND_BLUE", "/services/blue;80").start()?;
    host.etcd()?;
    host.etcd_daemon().pause()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    becomes(&embassy, "/v1/status", "one to be awaited", |status: &api::Status| {
        (status.sources, status.sources_down, status.sources_waiting) == (2, 0, 1)
    })?;
    host.etcd_daemon().resume()?;
    becomes(&embassy, "/v1/status", "all to answer", |status: &api::Status| {
        (status.sources, status.sources_down, status.sources_waiting) == (2, 0, 0)
    })?;
    Ok(())
}

#[test]
fn it_explains_what_stands_in_the_way_whatever_the_service() -> Result<()> {
    let host = Host::start()?;
    web(&host, "web")?;
    let greeter = host.server("greeter", ["greet"]).start()?;
    offer_at(&host, "greeter", &format!("{}:80", greeter.ip()?))?;
    offer_at(&host, "self", "172.17.0.1:84")?;
    // Its containers are on the same wire as this host, not behind it.
    host.network("far", ["--driver=macvlan", "--opt=parent=eth0", "--subnet=10.83.0.0/24"])?;
    let asking = |name: &str| {
        let app = host.client(name).env("BACKEND_WEB", "/services/web;80");
        let app = app.env("BACKEND_GREETER", "/services/greeter;81");
        app.env("BACKEND_SELF", "/services/self;84")
    };
    let (app, holder) = (asking("app").start()?, asking("holder").start()?);
    let inside = host.client("inside").network("far").env("BACKEND_WEB", "/services/web;80");
    let _inside = inside.start()?;
    let embassy = host.embassy([
        "--dnat",
        ETCD,
        "--max-connections-per-consumer=1",
        "--max-connections=2",
        "--proxy-ip=172.17.0.1",
        "--endpoints=172.16.0.0/12,172.17.0.1",
    ])?;
    embassy.wait_ready(READY)?;
    let explains = |who: &str, port: u16, verdict: Verdict, words: &str| {
        let path = format!("/v1/explain?consumer={who}&port={port}");
        becomes(&embassy, &path, words, |explain: &api::Explain| {
            explain.verdict == verdict
                && explain.findings.first().is_some_and(|first| first.text.contains(words))
        })
    };
    let well = explains("app", 80, Verdict::Ok, "goes to")?;
    assert_eq!(well.dial, ["172.17.0.1:80"], "{well:#?}");
    let far = explains(
        "inside",
        80,
        Verdict::Degraded,
        "No network of inside has a gateway on this host",
    )?;
    assert_eq!(far.dial, [""; 0]);

    let _held = hold(&holder, "held", "172.17.0.1:81")?;
    explains(
        "holder",
        81,
        Verdict::Broken,
        "(too_many_of_consumer): holder has 1 connection open",
    )?;
    explains("app", 80, Verdict::Ok, "goes to")?;
    // The limit is two connections.
    let _second = hold(&app, "second", "172.17.0.1:81")?;
    explains("app", 80, Verdict::Broken, "(too_many_connections): 2 connections are open")?;
    holder.remove()?;
    app.remove()?;
    let _app = asking("app").start()?;

    host.run("iptables", "-A INPUT -i lo -j ACCEPT".split(' '))?;
    host.run("iptables", ["-P", "INPUT", "DROP"])?;
    explains("app", 80, Verdict::Degraded, "which then time out: chain INPUT of iptables")?;
    host.run("iptables", ["-P", "INPUT", "ACCEPT"])?;
    explains("app", 80, Verdict::Ok, "goes to")?;
    embassy.kill()?;

    // With the user's own rules, the endpoint whose address is dialled gets nothing, and the other one everything.
    own_rules(&host)?;
    let embassy = host.embassy([ETCD, "--endpoints=172.16.0.0/12,172.17.0.1"])?;
    embassy.wait_ready(READY)?;
    let circular: api::Explain = get(&embassy, "/v1/explain?consumer=app&port=84")?;
    assert_eq!(
        (circular.verdict, &circular.services[0].next),
        (Verdict::Broken, &None),
        "{circular:#?}"
    );
    assert!(circular.findings[0].text.contains("(circular)"), "{circular:#?}");
    let neighbour = format!("{}:80", greeter.ip()?);
    offer_at(&host, "self", &neighbour)?;
    let path = "/v1/explain?consumer=app&port=84";
    becomes(&embassy, path, "the neighbour", |explain: &api::Explain| {
        explain.services[0].next.as_ref() == Some(&neighbour)
            && explain.findings.iter().any(|one| one.text.contains("(circular)"))
    })?;
    Ok(())
}

#[test]
fn wrong_requests_are_told_what_is_wrong() -> Result<()> {
    let host = Host::light()?;
    let embassy = host.embassy(["-provider=static", "-services=web;80"])?;
    testbed::eventually(READY, "the API", || embassy.admin("/healthz")?.ok())?;
    for (path, status, words) in [
        ("/v1/nothing", 404, "/v1/nothing"),
        ("/v1/routes?limit=many", 400, "limit"),
        ("/v1/routes?colour=blue", 400, "colour"),
        ("/v1/routes?state=ejcted", 400, "\"ejcted\" of routes: expected ok, degraded, ejected"),
        ("/v1/endpoints?state=ok", 400, "expected active, ejected"),
        ("/v1/bindings?state=ok", 400, "expected problem, routed"),
        ("/v1/sources?state=lost", 400, "expected up, down, waiting"),
        ("/v1/connections?state=closed", 400, "expected held, connecting, running, parked"),
        ("/v1/endpoints?consumer=app", 400, "do not belong to a consumer"),
        ("/v1/explain?consumer=app", 400, "port"),
        ("/v1/explain?consumer=app&port=0", 400, "port 0"),
        ("/v1/explain?consumer=app&port=70000", 400, "port"),
    ] {
        let answer = embassy.admin(path)?;
        let error: api::Error = serde_json::from_str(&answer.body)?;
        assert_eq!(answer.status, status, "{path}");
        assert!(error.error.contains(words), "{path}: {error:?}");
    }
    // A page whose name resolves to this host can read nothing. Nothing can be changed without a token.
    let mut curl = vec!["--silent", "--write-out", "%{http_code}", "--output", "/dev/null"];
    curl.extend(["--header", "Host: evil.example:9990"]);
    for (path, status) in
        [("/v1/status", "403"), ("/metrics", "403"), ("/healthz", "200"), ("/readyz", "200")]
    {
        let url = format!("http://127.0.0.1:9990{path}");
        // Not ready without an answer from Consul. Every client may know that.
        let expected = if path == "/readyz" { "503" } else { status };
        assert_eq!(host.run("curl", [&curl[..], &[&url]].concat())?, expected, "{path}");
    }
    let answer = host.http("POST", "http://127.0.0.1:9990/v1/status", "")?;
    assert_eq!(answer.status, 403, "{answer:?}");
    Ok(())
}
