//! The namespaces of a host, and the process that removes them.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Namespaces with one init process. Dropping it ends every process inside, and removes what was created for it.
#[derive(Debug)]
pub(crate) struct Space {
    /// `testbed keep`. It outlives this process for a moment: when the pipe to its stdin closes, for whatever reason, it
    /// cleans up.
    keeper: Child,
    init: u32,
    dir: PathBuf,
}

/// Variables of the user's session that would make a tool use something outside of the host.
const FOREIGN_VARIABLES: [&str; 11] = [
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "DOCKER_HOST",
    "DOCKER_CONTEXT",
    "DOCKER_API_VERSION",
    "DOCKER_CERT_PATH",
    "DOCKER_TLS_VERIFY",
];

impl Space {
    pub(crate) fn open() -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "a testbed host needs root: it makes network namespaces and runs a Docker engine"
        );
        let program = testbed_program()?;
        let mut keeper = Command::new(&program)
            .arg("keep")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Ctrl-C in the terminal must not reach it: it must clean up after us.
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;

        let mut line = String::new();
        if let Some(stdout) = keeper.stdout.take() {
            BufReader::new(stdout).read_line(&mut line).context("read the keeper's answer")?;
        }
        let answer = line.trim_end();
        let parsed = answer.strip_prefix("ready ").and_then(|rest| {
            let (init, dir) = rest.split_once(' ')?;
            Some((init.parse().ok()?, PathBuf::from(dir)))
        });
        match parsed {
            Some((init, dir)) => Ok(Self { keeper, init, dir }),
            None => {
                end(&mut keeper);
                bail!(
                    "could not make the namespaces of a host: {answer:?} from `{} keep`",
                    program.display()
                )
            }
        }
    }

    /// A folder with the same path inside and outside. It is removed with the host.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The ID of the init process, as seen from outside.
    pub(crate) fn init(&self) -> u32 {
        self.init
    }

    /// A number that no other running host on this machine has.
    pub(crate) fn number(&self) -> &str {
        self.dir.file_name().and_then(OsStr::to_str).unwrap_or_default()
    }

    /// A command that runs in the host's network, mount and process namespaces.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = plain("nsenter");
        command.arg(format!("--target={}", self.init));
        command.args(["--mount", "--net", "--pid", "--"]).arg(program);
        command
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        end(&mut self.keeper);
    }
}

/// A command without the user's proxy and Docker settings.
pub(crate) fn plain(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for variable in FOREIGN_VARIABLES {
        command.env_remove(variable);
    }
    command
}

/// The `testbed` program: it keeps the namespaces, and runs in the containers.
pub fn testbed_program() -> Result<PathBuf> {
    program_near("testbed", "TESTBED_BIN")
}

/// The path in `variable`, otherwise a program of this build.
pub(crate) fn program_near(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("find the running program")?;
    // Cargo puts tests into target/<profile>/deps and programs into target/<profile>.
    let mut near = own.ancestors().skip(1).take(2).map(|dir| dir.join(name));
    near.find(|path| path.is_file()).with_context(|| {
        format!(
            "no program {name} near {}: build it with `cargo build -p {name}`, or set {variable}",
            own.display()
        )
    })
}

fn end(keeper: &mut Child) {
    drop(keeper.stdin.take());
    // The only possible error is that it has already been waited for.
    let _ = keeper.wait();
}
