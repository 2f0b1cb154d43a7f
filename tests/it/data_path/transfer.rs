//! Bytes arrive unchanged.

use anyhow::Result;

use super::{Path, line, vip};

const BYTES: &str = "200000000";
/// Slower than the relay, so that all buffers on the way fill up.
const SLOW: &str = "40000000";

#[test]
fn bulk_is_whole_while_the_endpoint_reads_slowly() -> Result<()> {
    let path = Path::new(&[(1001, &format!("sink --rate {SLOW}"))])?;
    let said = path.peer("send", 1001, ["--bytes", BYTES, "--seed", "1"])?;
    assert_eq!(said["sent"]["bytes"].to_string(), BYTES);
    assert_eq!(said["answer"], line(&said["sent"]));
    Ok(())
}

#[test]
fn bulk_is_whole_while_the_consumer_reads_slowly() -> Result<()> {
    let source = format!("source --bytes {BYTES} --seed 1");
    let path = Path::new(&[(1001, &source), (1002, "sink")])?;
    let sent = path.peer("send", 1002, ["--bytes", BYTES, "--seed", "1"])?;
    let received = path.peer("recv", 1001, ["--rate", SLOW])?;
    assert_eq!(received["received"]["bytes"].to_string(), BYTES);
    assert_eq!(received["received"], sent["sent"]);
    Ok(())
}

#[test]
fn bulk_both_ways_at_once_is_whole_while_one_side_is_slow() -> Result<()> {
    let path = Path::new(&[
        (1001, &format!("duplex --bytes {BYTES} --seed 1")),
        (1002, &format!("duplex --bytes {BYTES} --seed 1 --rate {SLOW}")),
    ])?;
    for (port, rate) in [(1001, SLOW), (1002, "0")] {
        let said = path.peer("duplex", port, ["--bytes", BYTES, "--seed", "1", "--rate", rate])?;
        assert_eq!(said["sent"]["bytes"].to_string(), BYTES);
        // Both sides send the same.
        assert_eq!(said["received"], said["sent"]);
        assert_eq!(said["answer"], line(&said["sent"]));
    }
    Ok(())
}

#[test]
fn a_web_server_gives_many_small_answers_over_one_connection() -> Result<()> {
    let path = Path::new(&[(80, "http --name web")])?;
    let answers = path.app.get(vip(80)).times(5_000).at_once(10).keep_alive().run()?;
    assert_eq!((answers.from("web"), answers.failed()), (5_000, 0), "{answers:?}");
    Ok(())
}
