//! Running `nft` and `iptables`, as Docker and Kubernetes do.

use std::{io, process::Stdio, time::Duration};

use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

/// A program that is found by PATH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Program(pub &'static str);

/// Why a program did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error("cannot run {program}: {error}")]
    Start { program: &'static str, error: io::Error },
    /// `stderr` is the program's error output, or its exit status if there is none.
    #[error("{program} {args}: {stderr}")]
    Failed { program: &'static str, args: String, stderr: String },
    #[error("{program} {args}: no answer within {} s", Program::TIME.as_secs())]
    Silent { program: &'static str, args: String },
}

impl ProgramError {
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Start { error, .. } if error.kind() == io::ErrorKind::NotFound)
    }
}

impl Program {
    /// More than any lock that the programs wait for.
    const TIME: Duration = Duration::from_secs(10);

    /// What it prints, given `input`.
    pub(super) async fn run(self, args: &[&str], input: &str) -> Result<String, ProgramError> {
        let Self(program) = self;
        let start = |error| ProgramError::Start { program, error };
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            // A Ctrl-C at the terminal must end embassy, not the program that removes our rules.
            .process_group(0)
            .spawn()
            .map_err(start)?;
        let stdin = child.stdin.take();
        let talk = async {
            let write = async {
                if let Some(mut stdin) = stdin {
                    // A program that fails early does not read to the end; what it says about that is the better error.
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

#[cfg(test)]
mod tests {
    use super::*;

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
