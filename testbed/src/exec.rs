//! Running a command to its end.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `command`. Returns its stdout without the line end. A status other than 0 is an error that contains its stderr.
pub fn output(command: &mut Command) -> Result<String> {
    let words = describe(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {words}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{words}: {}\n{}{}", output.status, stderr.trim_end(), stdout.trim_end());
    }
    Ok(stdout.trim_end().to_owned())
}

/// The command as typed, without the part that enters the namespaces.
pub(crate) fn describe(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let start = match words.iter().rposition(|word| word == "--") {
        Some(at) if words[0] == "nsenter" => at + 1,
        _ => 0,
    };
    format!("`{}`", words[start..].join(" "))
}
