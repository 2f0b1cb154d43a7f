//! `file://`, changed in all the ways in which files change.

use std::{fs, os::unix::fs::symlink, path::Path};

use anyhow::Result;

use crate::followed::{Followed, list, rejected};

fn web(address: &str) -> String {
    format!("[[service]]\nname = \"web\"\nendpoints = [\"{address}\"]\n")
}

fn follow(path: &Path) -> Followed {
    Followed::new(&format!("file://{}", path.display()), "web;80")
}

#[tokio::test]
async fn every_way_to_change_a_file_is_seen() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("services.toml");
    fs::write(&path, web("10.0.0.1:80"))?;
    let followed = follow(&path);
    followed.sees(&["10.0.0.1:80"]).await;

    // Rewritten in place.
    fs::write(&path, web("10.0.0.2:80"))?;
    followed.sees(&["10.0.0.2:80"]).await;
    // Replaced by a rename, as careful programs do; and again, when it is another file.
    for address in ["10.0.0.3:80", "10.0.0.4:80"] {
        let other = folder.path().join("services.toml.new");
        fs::write(&other, web(address))?;
        fs::rename(&other, &path)?;
        followed.sees(&[address]).await;
    }
    fs::write(&path, web("10.0.0.5:80"))?;
    followed.sees(&["10.0.0.5:80"]).await;
    // No service of that name any more: a valid answer.
    fs::write(&path, "service = []")?;
    followed.sees(&[]).await;
    Ok(())
}

#[tokio::test]
async fn a_config_map_that_is_swapped_is_seen() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let version = |name: &str, address: &str| -> Result<()> {
        fs::create_dir(at(name))?;
        Ok(fs::write(at(name).join("services.toml"), web(address))?)
    };
    version("..1", "10.0.0.1:80")?;
    symlink("..1", at("..data"))?;
    symlink("..data/services.toml", at("services.toml"))?;
    let followed = follow(&at("services.toml"));
    followed.sees(&["10.0.0.1:80"]).await;

    for (old, new, address) in [("..1", "..2", "10.0.0.2:80"), ("..2", "..3", "10.0.0.3:80")] {
        version(new, address)?;
        symlink(new, at("..data_tmp"))?;
        fs::rename(at("..data_tmp"), at("..data"))?;
        fs::remove_dir_all(at(old))?;
        followed.sees(&[address]).await;
    }
    Ok(())
}

#[tokio::test]
async fn what_a_link_leads_to_is_watched() -> Result<()> {
    let (folder, elsewhere) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let real = elsewhere.path().join("real.toml");
    fs::write(&real, web("10.0.0.1:80"))?;
    let path = folder.path().join("services.toml");
    symlink(&real, &path)?;
    let followed = follow(&path);
    followed.sees(&["10.0.0.1:80"]).await;

    let other = elsewhere.path().join("real.toml.new");
    fs::write(&other, web("10.0.0.2:80"))?;
    fs::rename(&other, &real)?;
    followed.sees(&["10.0.0.2:80"]).await;
    Ok(())
}

/// The limit for watches is per user, so another process has none, in its own user namespace.
#[tokio::test]
async fn a_file_that_cannot_be_watched_is_read_again_and_again() {
    for limit in ["max_inotify_instances", "max_inotify_watches"] {
        let inner = "discovery_file::inner_test_without_watches";
        let script = format!(
            "echo 0 > /proc/sys/user/{limit}; exec \"$0\" --exact {inner} --ignored --nocapture"
        );
        let output = tokio::process::Command::new("unshare")
            .args(["--user", "--map-root-user", "sh", "-ec", &script])
            .arg(std::env::current_exe().unwrap())
            .kill_on_drop(true)
            .output()
            .await
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{limit}: {text}");
    }
}

#[tokio::test]
#[ignore = "run by the test before it, in a user namespace of its own"]
async fn inner_test_without_watches() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("services.toml");
    fs::write(&path, web("10.0.0.1:80")).unwrap();
    let followed = follow(&path);
    followed.sees(&["10.0.0.1:80"]).await;
    fs::write(&path, web("10.0.0.2:80")).unwrap();
    let known = followed.sees(&["10.0.0.2:80"]).await;
    assert_eq!(known.failures, 0, "it is no failure");
}

#[tokio::test]
async fn a_broken_or_missing_file_takes_nothing_away() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("services.toml");
    let followed = follow(&path);
    followed.fails("No such file").await;
    fs::write(&path, web("10.0.0.1:80"))?;
    followed.sees(&["10.0.0.1:80"]).await;

    for (text, error) in [
        ("[[service]", "services.toml: line 1: "),
        ("", "services.toml: it has no entries: expected [[service]]"),
    ] {
        fs::write(&path, text)?;
        let known = followed.fails(error).await;
        assert_eq!(list(&known).unwrap(), ["10.0.0.1:80"]);
        fs::write(&path, web("10.0.0.1:80"))?;
        followed.sees(&["10.0.0.1:80"]).await;
    }
    fs::remove_file(&path)?;
    let known = followed.fails("No such file").await;
    assert_eq!(list(&known).unwrap(), ["10.0.0.1:80"]);

    // One invalid entry does not make the file invalid.
    fs::write(&path, web("10.0.0.2:80\", \"h:80"))?;
    let known = followed.sees(&["10.0.0.2:80"]).await;
    let reason = "service 1 (web), endpoint 2: address \"h\": expected an IP address";
    assert_eq!(rejected(&known), [reason]);
    Ok(())
}
