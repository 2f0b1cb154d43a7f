//! Hosts for manual use.

use std::io::Write;
use std::process::{Command, ExitCode};
use std::{env, fs};

use anyhow::{Context, Result};
use testbed::Host;

const ETCD: &str = "http://127.0.0.1:2379";
const CONSUL: &str = "http://127.0.0.1:8500";

/// Starts a host with everything in it, prints how to reach it, and keeps it until it is killed.
pub(crate) fn up() -> Result<()> {
    let host = everything()?;
    let init = host.init_pid();
    println!(
        "A Docker host is up. It ends with this program: Ctrl-C.
  folder        {}
  init process  {init}
  docker        export DOCKER_HOST={}
  etcd          {ETCD}, v2 and v3, inside
  consul        {CONSUL}, inside
  enter it      nsenter --target={init} --mount --net --pid",
        host.dir().display(),
        host.docker_url(),
    );
    loop {
        std::thread::park();
    }
}

/// Runs a command in a new host, or an interactive shell if none is given. The host ends with it.
pub(crate) fn shell(words: &[&str]) -> Result<ExitCode> {
    let host = everything()?;
    let status = match words {
        [] => {
            println!(
                "A Docker host of its own; it ends with this shell. In here:
  docker     172.17.0.1 is docker0; images: testbed (busybox, curl, and `testbed peer ...` as server or client)
  etcd       $ETCD, v2 and v3     consul  $CONSUL
  logs       {}
try:  docker run -d --name web testbed testbed peer http --name web
      docker run --rm testbed curl -s http://172.17.0.2/",
                host.dir().display()
            );
            std::io::stdout().flush()?;
            let settings = host.dir().join("bashrc");
            fs::write(&settings, "[ -r ~/.bashrc ] && . ~/.bashrc\nPS1='[testbed] \\w\\$ '\n")?;
            inside(&host)?.arg("bash").arg("--rcfile").arg(settings).arg("-i").status()
        }
        words => inside(&host)?.args(words).status(),
    };
    let code = status.context("run the command")?.code();
    Ok(ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

fn everything() -> Result<Host> {
    let host = Host::start()?;
    host.load_image()?;
    host.etcd()?;
    host.consul()?;
    Ok(host)
}

/// A command in the user's working directory, with the programs of this build on the PATH.
fn inside(host: &Host) -> Result<Command> {
    let own = env::current_exe().context("find the running program")?;
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = own.parent().map(Into::into).into_iter().chain(env::split_paths(&path));
    let mut command = host.command("env");
    command.arg("--chdir").arg(env::current_dir().context("find the current folder")?);
    command.env("PATH", env::join_paths(dirs)?).env("DOCKER_HOST", host.docker_url());
    command.env("ETCD", ETCD).env("ETCDCTL_API", "3").env("CONSUL", CONSUL);
    Ok(command)
}
