//! The main job: a consumer declares a service in its environment, connects to a VIP, and reaches the service.

use anyhow::Result;
use testbed::Host;

use crate::{READY, WAIT};

#[test]
fn thirty_requests_over_three_endpoints_are_ten_each() -> Result<()> {
    thirty_requests("proxy")
}

/// The same with real containers in real control groups.
#[test]
fn thirty_requests_beside_the_proxy_are_ten_each() -> Result<()> {
    thirty_requests("kernel")
}

fn thirty_requests(path: &str) -> Result<()> {
    let host = Host::start()?;
    let etcd = host.etcd()?;
    for name in ["web-1", "web-2", "web-3"] {
        let web = host.web(name).start()?;
        etcd.v3().put(&format!("/services/web/80/{name}"), &format!("{}:80", web.ip()?))?;
    }
    let embassy =
        host.embassy(["--dnat", "-discovery=etcd://127.0.0.1:2379", &format!("--path={path}")])?;
    embassy.wait_ready(READY)?;

    let app = host.client("app").env("BACKEND_WEB", "/services/web/80;8080").start()?;
    testbed::eventually(WAIT, "the consumer's first answer", || {
        let answers = app.get("172.17.0.1:8080").run()?;
        anyhow::ensure!(answers.answered() == 1, "{answers:?}");
        Ok(())
    })?;
    let routes = embassy.admin("/v1/routes")?.json()?;
    assert_eq!(routes["items"][0]["path"], path, "{routes}");
    app.exec(["curl", "-sf", "http://172.17.0.1:8080"])?;

    let answers = app.get("172.17.0.1:8080").times(30).run()?;
    assert_eq!(answers.failed(), 0, "{answers:?}");
    for name in ["web-1", "web-2", "web-3"] {
        assert_eq!(answers.from(name), 10, "{answers:?}");
    }
    Ok(())
}
