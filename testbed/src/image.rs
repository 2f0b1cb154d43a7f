//! Images, built without a registry.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use crate::exec::output;
use crate::host::Host;
use crate::space::testbed_program;

/// The default image of containers: busybox, curl and the testbed program.
pub(crate) const BASE: &str = "testbed";

impl Host {
    /// Builds an image of busybox and `programs`, with the shared libraries that they need, and `files` (or folders) at the
    /// same paths as on this machine. Programs are put into /usr/bin. The first one is the entry point.
    pub fn image_with(
        &self,
        name: &str,
        programs: &[impl AsRef<Path>],
        files: &[&str],
    ) -> Result<()> {
        let programs: Vec<_> = programs.iter().map(|path| path.as_ref().to_owned()).collect();
        let files: Vec<_> = files.iter().map(PathBuf::from).collect();
        let first = programs
            .first()
            .and_then(|path| path.file_name())
            .context("an image needs a program")?;
        let entry = format!("ENTRYPOINT [\"/usr/bin/{}\"]", first.to_string_lossy());
        let tar = tarball(&programs, &files)?;
        output(self.docker_command(["import", "--change", &entry]).arg(tar).arg(name)).map(drop)
    }

    /// Loads the image `testbed`. The first container that needs it does this too.
    pub fn load_image(&self) -> Result<()> {
        // Held to the end, so that a second thread waits for the image instead of loading it again.
        let mut loaded =
            self.inner().base_image_loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if !*loaded {
            let tar = tarball(&[testbed_program()?, which("curl")?], &[])?;
            output(self.docker_command(["import"]).arg(tar).arg(BASE))?;
            *loaded = true;
        }
        Ok(())
    }
}

/// The folder for what is kept between runs: `$TESTBED_CACHE`, otherwise `.testbed/cache` in the repository.
pub(crate) fn cache_dir() -> PathBuf {
    match std::env::var_os("TESTBED_CACHE") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.testbed/cache"),
    }
}

/// A root file system, built once for each content.
fn tarball(programs: &[PathBuf], files: &[PathBuf]) -> Result<PathBuf> {
    let busybox = which("busybox")?;
    let mut hash = DefaultHasher::new();
    for path in programs.iter().chain(files).chain([&busybox]) {
        hash_file(&mut hash, path)?;
    }
    let cache = cache_dir();
    let path = cache.join(format!("image-{:016x}.tar", hash.finish()));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(&cache).with_context(|| format!("make {}", cache.display()))?;
    // Tests that start at the same time all get here: one builds the file, the others wait.
    let gate = File::create(cache.join("gate")).context("make the gate of the cache")?;
    gate.lock().context("lock the cache")?;
    if path.exists() {
        return Ok(path);
    }
    forget_old(&cache)?;
    let (root, unfinished) = (cache.join("root"), cache.join("root.tar"));
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("remove {}", root.display()))?;
    }
    fill(&root, &busybox, programs, files)?;
    output(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&unfinished).arg("."))?;
    fs::remove_dir_all(&root).with_context(|| format!("remove {}", root.display()))?;
    fs::rename(&unfinished, &path).with_context(|| format!("make {}", path.display()))?;
    Ok(path)
}

fn fill(root: &Path, busybox: &Path, programs: &[PathBuf], files: &[PathBuf]) -> Result<()> {
    for dir in [
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
        "etc",
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "var",
    ] {
        let dir = root.join(dir);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    }
    for dir in ["bin", "sbin", "lib", "lib64"] {
        symlink(Path::new("usr").join(dir), root.join(dir))?;
    }
    symlink("../run", root.join("var/run"))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;

    let bin = root.join("usr/bin");
    fs::copy(busybox, bin.join("busybox")).context("copy busybox, of Debian's busybox-static")?;
    for applet in
        output(Command::new(busybox).arg("--list"))?.lines().filter(|&name| name != "busybox")
    {
        symlink("busybox", bin.join(applet))?;
    }

    let mut libraries = BTreeSet::new();
    for program in programs {
        let target = bin.join(program.file_name().context("a program has a name")?);
        if target.is_symlink() {
            fs::remove_file(&target)?;
        }
        copy_stripped(program, &target)?;
        libraries.extend(libraries_of(program)?);
    }
    for file in files {
        libraries.extend(libraries_of(file)?);
    }
    for path in libraries.iter().chain(files) {
        let inside = path
            .strip_prefix("/")
            .with_context(|| format!("{} is no absolute path", path.display()))?;
        let target = root.join(inside);
        fs::create_dir_all(target.parent().unwrap_or(root))?;
        output(
            Command::new("cp")
                .args(["--recursive", "--dereference", "--force"])
                .arg(path)
                .arg(target),
        )?;
    }
    Ok(())
}

/// Copies a program without debug information, which is most of a debug build.
fn copy_stripped(from: &Path, to: &Path) -> Result<()> {
    if output(Command::new("strip").arg("-o").arg(to).arg(from)).is_err() {
        fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    }
    Ok(())
}

/// The shared libraries of a program, including the loader. Empty for a static program, a script or a folder.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").env("LC_ALL", "C").arg(program).output().context("run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(!text.contains("not found"), "{} lacks a library:\n{text}", program.display());
    // Lines are `name => /path (address)` or, for the loader, `/path (address)`.
    let paths =
        text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.filter(|path| !path.ends_with(':')).map(PathBuf::from).collect())
}

fn hash_file(hash: &mut DefaultHasher, path: &Path) -> Result<()> {
    hash.write(path.as_os_str().as_encoded_bytes());
    if path.is_dir() {
        let mut entries =
            fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        entries.sort();
        return entries.iter().try_for_each(|entry| hash_file(hash, entry));
    }
    hash.write(&fs::read(path).with_context(|| format!("read {}", path.display()))?);
    Ok(())
}

/// Each build of the testbed creates an image. Those of earlier days are not needed.
fn forget_old(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        let is_ours = entry.file_name().to_string_lossy().starts_with("image-");
        let modified = entry.metadata().and_then(|data| data.modified());
        let is_old = modified.is_ok_and(|time| {
            SystemTime::now()
                .duration_since(time)
                .is_ok_and(|age| age > Duration::from_secs(24 * 3600))
        });
        if is_ours && is_old {
            // Another process may have removed it.
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// The path of a program.
pub(crate) fn which(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(OsStr::new(program)))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("{program} is not on PATH: testbed/setup.sh installs what is needed")
        })
}
