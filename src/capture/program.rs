//! Runs `nft` and `iptables`, as Docker and Kubernetes do.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{io, process::Stdio, time::Duration};

use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use crate::privileges;

/// A program of this host. It is searched in [`PATH`] only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Program(pub &'static str);

/// The search path. Directories in embassy's own PATH may belong to another user.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a program failed.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error("cannot run {program}: {error}")]
    Start { program: &'static str, error: io::Error },
    /// `stderr` is the program's error output, or its exit status if there is none.
    #[error("{program} {args}: {stderr}")]
    Failed { program: &'static str, args: String, stderr: String },
    #[error("{program} {args}: no answer within {} s", Program::TIME.as_secs())]
    Silent { program: &'static str, args: String },
    /// The `nft` program added a rule to the table that iptables cannot show.
    #[error(
        "{program} cannot show table {table}: iptables does not know one of its rules, which another program wrote (nft -a list table ip {table})"
    )]
    Unlisted { program: &'static str, table: &'static str },
}

impl ProgramError {
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Start { error, .. } if error.kind() == io::ErrorKind::NotFound)
    }
}

impl Program {
    /// Timeout. Longer than any lock that the programs wait for.
    const TIME: Duration = Duration::from_secs(10);

    /// The output of `iptables-save` for a table.
    pub(super) async fn saved(self, table: &'static str) -> Result<String, ProgramError> {
        let text = self.run(&["-t", table], "").await?;
        // The program shows such a table only as a comment, and exits with 0.
        match text.lines().any(|line| line.starts_with('#') && line.contains("is incompatible")) {
            true => Err(ProgramError::Unlisted { program: self.0, table }),
            false => Ok(text),
        }
    }

    /// Runs the program with `input`. Returns its output.
    pub(super) async fn run(self, args: &[&str], input: &str) -> Result<String, ProgramError> {
        let Self(program) = self;
        let start = |error| ProgramError::Start { program, error };
        let mut command = Command::new(program);
        command
            .args(args)
            // embassy's environment must not change what the program does, and may contain a token.
            .env_clear()
            .env("PATH", PATH)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            // Ctrl-C in the terminal must end embassy, but not the program that removes our rules.
            .process_group(0);
        let mut child = privileges::hand_down(|| command.spawn()).map_err(start)?;
        let stdin = child.stdin.take();
        let talk = async {
            let write = async {
                if let Some(mut stdin) = stdin {
                    // A program that fails early does not read all its input. Its own message is the better error.
                    let _ = stdin.write_all(input.as_bytes()).await;
                }
            };
            tokio::join!(write, child.wait_with_output()).1
        };
        let args = args.join(" ");
        match timeout(Self::TIME, talk).await {
            Err(_) => Err(ProgramError::Silent { program, args }),
            Ok(output) => {
                let output = output.map_err(start)?;
                if output.status.success() {
                    return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
                }
                let mut stderr = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
                if stderr.is_empty() {
                    stderr = output.status.to_string();
                }
                Err(ProgramError::Failed { program, args, stderr })
            }
        }
    }
}

/// The processor time of all programs that this process started and that have ended (man 5 proc_pid_stat).
pub(super) fn time_of_programs() -> Duration {
    std::fs::read_to_string("/proc/self/stat")
        .ok()
        .and_then(|stat| time_in(&stat))
        .unwrap_or_default()
}

/// The pause before other programs' rules are read again, if reading them took `took` of processor time. It limits the cost
/// to 1 % of a processor, however large the rules are and however often they change.
pub(super) fn rest(took: Duration) -> Duration {
    const REST: u32 = 100;
    READ.max(took.saturating_mul(REST))
}

/// Minimum interval for reading other programs' rules, which starts programs.
pub(super) const READ: Duration = Duration::from_secs(5);

fn time_in(stat: &str) -> Option<Duration> {
    // USER_HZ is 100 on all machines on which Linux runs today.
    const TICK: Duration = Duration::from_millis(10);
    // The process name, in parentheses, may contain anything. cutime and cstime are the 16th and 17th field.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(13).map(str::parse::<u32>);
    let (user, system) = (fields.next()?.ok()?, fields.next()?.ok()?);
    Some(TICK.saturating_mul(user.saturating_add(system)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_time_of_programs_is_counted_when_they_end() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 70 8 20 0 1 0";
        assert_eq!(time_in(stat), Some(Duration::from_millis(780)));
        assert_eq!(time_in("7 (a) S 1"), None);
        let before = time_of_programs();
        let work = "n=0; while [ $n -lt 100000 ]; do n=$((n + 1)); done";
        Program("sh").run(&["-c", work], "").await.unwrap();
        assert!(time_of_programs() > before);
    }

    #[tokio::test]
    async fn a_program_gets_nothing_of_this_process_but_its_capability() {
        assert!(std::env::vars().count() > 1, "there are variables that it could get");
        let variables = Program("env").run(&[], "").await.unwrap();
        assert_eq!(variables, format!("PATH={PATH}\n"));
        let ambient = async || {
            let status = Program("cat").run(&["/proc/self/status"], "").await.unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("CapAmb:"));
            u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
        };
        let has = privileges::is_permitted();
        assert_eq!(ambient().await, if has { 1 << 12 } else { 0 });
    }

    #[tokio::test]
    async fn a_program_that_fails_without_a_word_is_told_by_its_end() {
        let fails = |script| async move {
            Program("sh").run(&["-c", script], "").await.unwrap_err().to_string()
        };
        assert_eq!(
            fails("echo no >&2; echo way >&2; exit 3").await,
            "sh -c echo no >&2; echo way >&2; exit 3: no; way"
        );
        assert_eq!(fails("exit 3").await, "sh -c exit 3: exit status: 3");
        assert_eq!(fails("kill -9 $$").await, "sh -c kill -9 $$: signal: 9 (SIGKILL)");
    }
}
