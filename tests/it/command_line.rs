//! The command line: what is printed where, and the exit codes.

use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

fn embassy(words: &[&str], variables: &[(&str, &str)]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_embassy"));
    Ok(command.args(words).env_clear().envs(variables.iter().copied()).output()?)
}

#[test]
fn a_wrong_command_line_is_one_line_and_exit_2() -> Result<()> {
    for (words, variables, line) in [
        (
            &["-prot", "1"][..],
            &[][..],
            "embassy: --prot: unknown flag; did you mean --port? --help lists them all\n",
        ),
        (&["-p", "0"], &[], "embassy: --port \"0\": expected a port from 1 to 65535\n"),
        (
            &["-discovery=marathon://h:8080"],
            &[],
            "embassy: --discovery \"marathon://h:8080\": marathon is not supported\n",
        ),
        (
            &["--dnat"],
            &[("PROXY_PORT", "http")],
            "embassy: PROXY_PORT \"http\": expected a port from 1 to 65535\n",
        ),
        (
            &["--dnat"],
            &[("RUST_LOG", "debg")],
            "embassy: RUST_LOG \"debg\": expected a level such as info, or targets with levels such as warn,embassy=debug\n",
        ),
    ] {
        let output = embassy(words, variables)?;
        assert_eq!(output.status.code(), Some(2), "{words:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), line);
        assert_eq!(output.stdout, b"", "{words:?}");
    }
    Ok(())
}

#[test]
fn a_shell_reads_the_completions_and_man_the_manual() -> Result<()> {
    for (words, part) in [
        (&["completions", "bash"][..], "complete -F _embassy"),
        (&["completions", "zsh"], "#compdef embassy"),
        (&["completions", "fish"], "complete -c embassy"),
        (&["man"], ".SH SUBCOMMANDS"),
        (&["man", "plan"], ".TH embassy-plan 1"),
        (&["help", "plan"], "Usage: embassy plan [OPTIONS] [FLAGS OF THE PROXY]"),
        (&["cleanup", "--help"], "Usage: embassy cleanup [OPTIONS]"),
    ] {
        let output = embassy(words, &[])?;
        assert_eq!(output.status.code(), Some(0), "{words:?}");
        let text = String::from_utf8(output.stdout)?;
        assert!(text.contains(part), "{words:?}: {text}");
    }
    // Completions offer the values of a flag.
    let text = String::from_utf8(embassy(&["completions", "bash"], &[])?.stdout)?;
    for words in [
        "declared all",
        "auto nft nft-shared iptables",
        "docker static",
        "rr leastconn",
        "text json",
    ] {
        ensure!(text.contains(&format!("-W \"{words}\"")), "{words}: {text}");
    }
    // A manual page for each command, as `make dist` finds them.
    let help = String::from_utf8(embassy(&["--help"], &[])?.stdout)?;
    let (_, commands) = help.split_once("\nCommands:\n").context("no commands")?;
    let names = commands.lines().take_while(|line| !line.is_empty());
    let names: Vec<_> =
        names.filter_map(|line| line.strip_prefix("  ")?.split(' ').next()).collect();
    let names: Vec<_> = names.into_iter().filter(|name| !name.is_empty()).collect();
    ensure!(names.len() >= 10, "{help}");
    for name in names {
        let page = String::from_utf8(embassy(&["man", name], &[])?.stdout)?;
        ensure!(page.contains(&format!(".TH embassy-{name} 1")), "{name}: {page}");
    }
    // A syntax error would be reported here.
    let bash = "source <(\"$0\" completions bash) && complete -p embassy";
    let output = Command::new("bash").args(["-c", bash, env!("CARGO_BIN_EXE_embassy")]).output()?;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stderr, b"");
    Ok(())
}

#[test]
fn a_manual_page_that_there_is_not_is_a_wrong_command_line_with_those_that_there_are() -> Result<()>
{
    let output = embassy(&["man", "nosuch"], &[])?;
    let said = String::from_utf8(output.stderr)?;
    assert_eq!((output.status.code(), &*output.stdout), (Some(2), &b""[..]), "{said}");
    assert!(said.contains("\"nosuch\"") && said.contains("status, ps, explain"), "{said}");
    Ok(())
}

#[test]
fn help_and_version_go_to_stdout() -> Result<()> {
    for (word, beginning) in [
        ("-help", "Connects the containers of this host to the services they need."),
        ("--version", concat!("embassy ", env!("CARGO_PKG_VERSION"), "\n")),
    ] {
        let output = embassy(&[word], &[])?;
        assert_eq!(output.status.code(), Some(0), "{word}");
        let text = String::from_utf8(output.stdout)?;
        assert!(text.starts_with(beginning), "{text}");
        assert_eq!(output.stderr, b"", "{word}");
    }
    Ok(())
}
