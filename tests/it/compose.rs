//! dist/compose.yaml, run as it stands by docker-compose, with images that are made here under the names that it has.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use testbed::{Host, consul_program, output};

use crate::{WAIT, least_privilege::image};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/compose.yaml");

/// The images of the file. Their own commands are what the file relies on: a web server, and curl that takes flags.
fn images(host: &Host) -> Result<()> {
    image(host)?;
    host.load_image()?;
    host.docker(["tag", "testbed", "busybox"])?;
    host.image_with("hashicorp/consul:1.20", &[consul_program()], &[])?;
    let curl = output(Command::new("which").arg("curl"))?;
    host.image_with("curlimages/curl", &[curl], &[])?;
    let context = host.dir().join("nginx");
    std::fs::create_dir_all(&context)?;
    // Each instance answers with its own address.
    let words = "exec testbed peer http --port 80 --name $(hostname -i)";
    let dockerfile = format!("FROM testbed\nCMD [\"sh\", \"-c\", \"{words}\"]\n");
    std::fs::write(context.join("Dockerfile"), dockerfile)?;
    host.docker(["build", "--tag=nginx:alpine", &context.display().to_string()]).map(drop)
}

fn compose<const N: usize>(host: &Host, words: [&str; N]) -> Result<String> {
    let group = host.run("stat", ["-c", "%g", "/var/run/docker.sock"])?;
    let mut command = Command::new("docker-compose");
    // Not the user's logins and contexts, nor a project of theirs.
    command.env("DOCKER_CONFIG", host.dir().join("docker-config")).env_remove("COMPOSE_FILE");
    command.env("DOCKER_HOST", host.docker_url()).env("DOCKER_GROUP", group);
    output(command.args(["--project-name", "example", "--file", FILE]).args(words))
}

#[test]
fn the_example_for_compose_serves_its_consumer_by_both_instances() -> Result<()> {
    ensure!(Path::new(FILE).exists());
    let host = Host::start()?;
    images(&host)?;
    compose(&host, ["up", "--detach"])?;
    let get = || compose(&host, ["exec", "-T", "app", "wget", "-qO-", "http://proxy/"]);
    let served = testbed::eventually(WAIT, "an answer of each instance", || {
        let mut answers = [get()?, get()?];
        answers.sort();
        ensure!(answers == ["172.30.0.11", "172.30.0.12"], "{answers:?}");
        Ok(())
    });
    if let Err(error) = served {
        let said = compose(&host, ["logs", "--no-color"]).unwrap_or_default();
        return Err(error.context(said));
    }
    // The others do not get what they did not ask for.
    // Not wget's own timeout: busybox crashes with it where it is linked statically.
    let get = ["exec", "-T", "web-1", "timeout", "5", "wget", "-qO-", "http://172.17.0.1/"];
    let other = compose(&host, get);
    let said = other.err().context("who asks for nothing is served")?;
    let said = format!("{said:#}");
    // The second: it was ended by `timeout`.
    ensure!(said.contains("refused") || said.contains("exit status: 143"), "{said}");
    let said = compose(&host, ["exec", "-T", "embassy", "embassy", "status"])?;
    ensure!(said.contains("ready: embassy"), "{said}");
    compose(&host, ["down", "--volumes"])?;
    let rules = host.run("sh", ["-c", "nft list ruleset; iptables-save"])?;
    ensure!(!rules.to_lowercase().contains("embassy"), "{rules}");
    Ok(())
}
