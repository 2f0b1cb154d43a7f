//! A consumer reaches what the registry contains: registrations, changes and removals, in each of the three registries.

use anyhow::{Result, ensure};
use testbed::{Answers, Consul, Container, Etcd, Host, eventually};

use crate::{READY, WAIT, commands::run, support::says};

const VIP: &str = "172.17.0.1:80";

/// A registry with instances of one service.
trait Registry {
    /// Registers the instance `name` at `address`, port 80. Replaces its earlier address.
    fn register(&self, name: &str, address: &str) -> Result<()>;
    fn remove(&self, name: &str) -> Result<()>;
}

/// What registrator writes: a plain `host:port`.
struct Plain<'a>(&'a Etcd);

impl Registry for Plain<'_> {
    fn register(&self, name: &str, address: &str) -> Result<()> {
        self.0.v3().put(&format!("/services/web/80/{name}"), &format!("{address}:80"))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.0.v3().delete(&format!("/services/web/80/{name}"))
    }
}

/// What service-registrar writes: a JSON document in a tree of host ports.
struct Documents<'a>(&'a Etcd);

fn document(address: &str) -> String {
    format!(
        r#"{{"id": "13532987eae2831eb7d41f38172cb82d", "host": "fury", "ipaddress": "{address}",
             "env": {{"NAME": "apache"}}, "tags": [], "name": "/trusting_shockley", "image": "eboraas/apache",
             "hostname": "13532987eae2", "host_port": "80", "proto": "tcp", "port": "8080",
             "path": "/services/web/80/49161/13532987eae2"}}"#
    )
}

impl Registry for Documents<'_> {
    fn register(&self, name: &str, address: &str) -> Result<()> {
        self.0.v2().put(&format!("/services/web/80/49161/{name}"), &document(address))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.0.v2().delete(&format!("/services/web/80/49161/{name}"))
    }
}

impl Registry for Consul {
    fn register(&self, name: &str, address: &str) -> Result<()> {
        // The node's address is 127.0.0.1, where nothing serves it.
        self.service(name, "web").address(address).port(80).register()
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.deregister(name)
    }
}

#[test]
fn etcd_v3_is_followed() -> Result<()> {
    let host = Host::light()?;
    follow(&host, &Plain(&host.etcd()?), "etcd://127.0.0.1:2379", "/services/web/80;80")
}

#[test]
fn etcd_v2_is_followed() -> Result<()> {
    let host = Host::light()?;
    follow(&host, &Documents(&host.etcd()?), "etcd://127.0.0.1:2379", "/services/web/80;80")
}

#[test]
fn consul_is_followed() -> Result<()> {
    let host = Host::light()?;
    follow(&host, &host.consul()?, "consul://127.0.0.1:8500", "web;80")
}

fn follow(host: &Host, registry: &dyn Registry, discovery: &str, descriptor: &str) -> Result<()> {
    let servers = ["web-1", "web-2", "web-3"].map(|name| host.web(name).start());
    let [first, second, third] = servers;
    let (first, second, third) =
        (first?.ip()?.to_string(), second?.ip()?.to_string(), third?.ip()?.to_string());
    registry.register("a", &first)?;
    let app = host.client("app").env("BACKEND_WEB", descriptor).start()?;
    let embassy = host.embassy(["--dnat", "-discovery", discovery, "--empty-hold=0"])?;
    embassy.wait_ready(READY)?;
    let only = |name: &str| {
        eventually(WAIT, &format!("all answers from {name}"), || {
            let answers = app.get(VIP).times(4).run()?;
            ensure!(answers.from(name) == 4, "{answers:?}");
            Ok(())
        })
    };
    only("web-1")?;

    // An endpoint is added under load: it is used, and no request fails.
    let answers = under_load(&app, || registry.register("b", &second))?;
    ensure!(answers.failed() == 0 && answers.from("web-2") > 0, "while adding: {answers:?}");

    // An instance moves.
    registry.remove("a")?;
    only("web-2")?;
    registry.register("b", &third)?;
    only("web-3")?;

    // The last instance is removed: connections are reset at once. They work again with the next instance.
    registry.remove("b")?;
    eventually(WAIT, "no endpoint", || {
        let answers = app.get(VIP).run()?;
        ensure!(answers.failed() == 1, "{answers:?}");
        Ok(())
    })?;
    let probe = app.probe(VIP)?;
    ensure!(probe.outcome == "reset", "{probe:?}");
    registry.register("c", &first)?;
    only("web-1")
}

/// Requests from `app`, each on its own connection, during `change`.
fn under_load(app: &Container, change: impl FnOnce() -> Result<()>) -> Result<Answers> {
    std::thread::scope(|scope| {
        let load = scope.spawn(|| app.get(VIP).times(3000).at_once(4).run());
        change()?;
        load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?
    })
}

#[test]
fn only_instances_that_pass_their_checks_are_used() -> Result<()> {
    let host = Host::light()?;
    let consul = host.consul()?;
    for name in ["web-1", "web-2"] {
        let address = host.web(name).start()?.ip()?;
        consul.service(name, "web").address(address).port(80).check("passing").register()?;
    }
    let app = host.client("app").env("BACKEND_WEB", "web;80").start()?;
    let embassy = host.embassy(["--dnat", "-discovery=consul://127.0.0.1:8500", "-resync=3600"])?;
    embassy.wait_ready(READY)?;
    let spread = |first: usize, second: usize, when: &str| {
        eventually(WAIT, when, || {
            let answers = app.get(VIP).times(10).run()?;
            ensure!(
                answers.from("web-1") == first && answers.from("web-2") == second,
                "{answers:?}"
            );
            Ok(())
        })
    };
    spread(5, 5, "both while both pass")?;
    consul.set_check("web-1", "critical")?;
    spread(0, 10, "one while the other is critical")?;
    consul.set_check("web-1", "passing")?;
    spread(5, 5, "both after it passes again")?;
    consul.maintenance("web-2", true)?;
    spread(10, 0, "one while the other is in maintenance")?;
    consul.maintenance("web-2", false)?;
    spread(5, 5, "both after maintenance")
}

/// A problem in the registry is in the log, in `status`, in `explain` and in `ps`.
#[test]
fn what_a_registry_lacks_is_said_everywhere() -> Result<()> {
    let host = Host::light()?;
    let consul = host.consul()?;
    let address = host.web("web").start()?.ip()?;
    consul.service("web-1", "web").address(address).port(80).check("warning").register()?;
    consul.service("front-1", "front").address(address).port(80).tags(["prod"]).register()?;
    consul.service("named", "front").address("db.example").port(80).register()?;
    let app = host
        .client("app")
        .env("BACKEND_WEB", "web;80")
        .env("BACKEND_TAG", "front[canary];81")
        .env("BACKEND_NAME", "frnt;82")
        .env("BACKEND_FRONT", "front;83")
        .start()?;
    let embassy =
        host.embassy(["--dnat", "-discovery=consul://127.0.0.1:8500", "--empty-hold=0"])?;
    embassy.wait_ready(READY)?;
    // The only instance has a warning, and is used.
    crate::support::reaches(&app, VIP, "web")?;

    let warning = r#"consul web: 0 of 1 registered instances pass their checks ("Service 'web' check" is warning); 1 in warning used instead."#;
    let tag = "consul front[canary]: it is registered, and no instance carries [canary]; tags there: prod.";
    let name = "consul frnt: no service has this name, or the token may not read it; near: front.";
    let skipped = "An entry of consul front was skipped: named on testbed: address \"db.example\": expected an IP address.";
    let (status, _) = run(&host, &["status"])?;
    for line in [warning, tag, name, skipped] {
        ensure!(status.contains(line), "{line} in {status}");
    }
    for (port, line) in [("80", warning), ("81", tag), ("82", name), ("83", skipped)] {
        let (explained, _) = run(&host, &["explain", "app", port])?;
        ensure!(explained.contains(line), "{line} in {explained}");
    }
    let (routes, _) = run(&host, &["ps"])?;
    let state = |service: &str| routes.lines().find(|line| line.contains(service)).unwrap_or("");
    ensure!(state("consul web").contains("degraded"), "{routes}");
    ensure!(state("consul frnt").contains("no_endpoint"), "{routes}");
    says(&embassy, &["service has a problem in its registry", "consul web", "is warning"])?;

    // The end of the problem is reported.
    consul.set_check("web-1", "passing")?;
    says(&embassy, &["service has no problem in its registry any more", "consul web"])?;
    let (status, _) = run(&host, &["status"])?;
    ensure!(!status.contains("consul web:"), "{status}");
    Ok(())
}

/// Each watch is a query that Consul holds, on its own connection.
#[test]
fn however_many_consumers_ask_for_a_service_it_is_watched_once() -> Result<()> {
    let host = Host::light()?;
    let web = host.web("web").start()?;
    host.consul()?.service("web", "web").address(web.ip()?).port(80).tags(["a"]).register()?;
    let app = |name: &str, binding: &str| host.client(name).env("BACKEND_WEB", binding).start();
    let same = ["one", "two", "three"].map(|name| app(name, "web;80"));
    let same: Vec<_> = same.into_iter().collect::<Result<_>>()?;
    // A re-read would use another connection.
    let embassy = host.embassy(["--dnat", "-discovery=consul://127.0.0.1:8500", "-resync=3600"])?;
    embassy.wait_ready(READY)?;
    // Connections to port 8500 in the kernel's list. 01 is TCP_ESTABLISHED.
    let watches = |expected: usize| {
        eventually(WAIT, &format!("{expected} held queries"), || {
            let list = host.run("cat", ["/proc/net/tcp"])?;
            let open = list.lines().filter(|line| line.contains(" 0100007F:2134 01 ")).count();
            ensure!(open == expected, "{open}: {list}");
            Ok(())
        })
    };
    for app in &same {
        crate::support::reaches(app, VIP, "web")?;
    }
    watches(1)?;
    // Other tags or another datacentre are another query, again one for all consumers.
    let others = ["four", "five"].map(|name| app(name, "web[a];80"));
    for app in others {
        crate::support::reaches(&app?, VIP, "web")?;
    }
    watches(2)?;
    let there = app("six", "web;80;dc=dc1")?;
    crate::support::reaches(&there, VIP, "web")?;
    watches(3)
}
