//! The engine of a host: this machine's, or one that `engines.sh` has put into the cache.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::image::cache_dir;
use crate::space::Space;

/// podman's configuration instead of arguments: containers on the default network get the same addresses as with Docker.
const PODMAN: &str = r#"
[network]
default_subnet = "172.17.0.0/16"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"#;

/// An engine in the cache.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    name: String,
    root: PathBuf,
}

impl Engine {
    /// The engine that the variable `ENGINE` names. `None`: this machine's.
    pub(crate) fn chosen() -> Result<Option<Self>> {
        let name = match std::env::var("ENGINE") {
            Ok(name) if !name.is_empty() => name,
            _ => return Ok(None),
        };
        let link = cache_dir().join("engines").join(&name);
        let root = fs::canonicalize(&link).with_context(|| {
            format!(
                "ENGINE={name}: no engine {}: testbed/engines.sh {name} fetches it",
                link.display()
            )
        })?;
        ensure!(root.is_dir(), "ENGINE={name}: {} is no folder", root.display());
        Ok(Some(Self { name, root }))
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn is_podman(&self) -> bool {
        self.name.starts_with("podman")
    }

    /// The arguments for `sh` to run a program of this engine inside a host.
    fn enter(&self, space: &Space, group: &str, words: Vec<OsString>) -> Vec<OsString> {
        let mut all = vec![concat!(env!("CARGO_MANIFEST_DIR"), "/enter-engine.sh").into()];
        all.push(self.root.clone().into());
        all.push(space.dir().into());
        all.push(group.into());
        all.extend(words);
        all
    }

    /// dockerd. The place of its control groups is set by an argument.
    pub(crate) fn dockerd(&self, space: &Space, args: Vec<OsString>) -> Vec<OsString> {
        let words = std::iter::once("dockerd".into()).chain(args);
        self.enter(space, "", words.collect())
    }

    /// podman's service, which answers like Docker. The place of its control groups cannot be set by an argument.
    pub(crate) fn podman(
        &self,
        space: &Space,
        group: &str,
        socket: &Path,
    ) -> Result<Vec<OsString>> {
        let (settings, socket) = (space.dir().join("containers.conf"), socket.display());
        fs::write(&settings, PODMAN).with_context(|| format!("write {}", settings.display()))?;
        let script = format!(
            "ln -sf {socket} /run/docker.sock; CONTAINERS_CONF={settings} exec podman --root /run/testbed/podman \
             --runroot /run/podman --storage-driver overlay system service --time 0 unix://{socket}",
            settings = settings.display(),
        );
        Ok(self.enter(space, group, ["sh", "-euc", &script].map(Into::into).into()))
    }
}
