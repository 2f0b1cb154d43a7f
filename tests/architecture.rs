//! The modules are ordered in the direction in which data flows: a module of the library uses only those before it in
//! `src/lib.rs`, and the files of one folder do not use one another in circles.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The code of a file, without tests and comments.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source file can be read");
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The modules that a file declares, except those of tests.
fn declared(code: &str) -> Vec<String> {
    let mut modules = Vec::new();
    let mut before = "";
    for line in code.lines() {
        let words = line.trim_start_matches("pub ").trim_start_matches("pub(crate) ");
        let words = words.trim_start_matches("pub(super) ");
        let name = words.strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';'));
        if let Some(name) = name
            && !before.contains("cfg(test)")
        {
            modules.push(name.to_owned());
        }
        before = line;
    }
    modules
}

/// The first names of all paths that start with `root`, such as `crate`: `crate::a::b` and `crate::{a, b::c}`.
fn named(code: &str, root: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let start = format!("{root}::");
    for (at, _) in code.match_indices(&start) {
        let outer = code[..at].chars().next_back();
        if outer.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &code[at + start.len()..];
        match rest.strip_prefix('{') {
            None => names.extend(first_name(rest)),
            Some(list) => {
                let (mut depth, mut from) = (0, 0);
                for (i, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        ',' if depth == 0 => {
                            names.extend(first_name(list[from..i].trim()));
                            from = i + 1;
                        }
                        '}' if depth == 0 => {
                            names.extend(first_name(list[from..i].trim()));
                            break;
                        }
                        '}' => depth -= 1,
                        _ => {}
                    }
                }
            }
        }
    }
    names
}

fn first_name(path: &str) -> Option<String> {
    let end = path.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(path.len());
    (end > 0).then(|| path[..end].to_owned())
}

/// The file of a module, and the folder of its submodules.
fn place(folder: &Path, name: &str) -> (PathBuf, PathBuf) {
    let below = folder.join(name);
    let file = below.join("mod.rs");
    if file.exists() { (file, below) } else { (folder.join(format!("{name}.rs")), below) }
}

/// The code of a module and all its submodules. Relative paths are turned into paths from `crate`.
fn whole(file: &Path, folder: &Path) -> String {
    let mut all = code(file);
    for name in declared(&all) {
        let (file, folder) = place(folder, &name);
        all.push_str(&whole(&file, &folder));
    }
    all
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

#[test]
fn a_module_uses_only_those_before_it() {
    let order = declared(&code(&source().join("lib.rs")));
    let mut wrong = Vec::new();
    for (n, module) in order.iter().enumerate() {
        let (file, folder) = place(&source(), module);
        let used = named(&whole(&file, &folder), "crate");
        let later = order.iter().skip(n + 1).filter(|later| used.contains(*later));
        wrong.extend(later.map(|later| format!("{module} uses {later}")));
    }
    assert!(wrong.is_empty(), "src/lib.rs lists the modules in order: {wrong:#?}");
}

#[test]
fn the_files_of_a_folder_use_one_another_in_no_circle() {
    let mut wrong = Vec::new();
    look(&source(), &code(&source().join("lib.rs")), "crate", &mut wrong);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Looks for circles among the modules that `parent` declares, and among their submodules.
fn look(folder: &Path, parent: &str, path: &str, wrong: &mut Vec<String>) {
    let siblings = declared(parent);
    let mut uses: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for name in &siblings {
        let (file, below) = place(folder, name);
        let own = code(&file);
        let mut used = named(&own, "super");
        used.extend(named(&own, path));
        for child in declared(&own) {
            let (file, below) = place(&below, &child);
            let inner = whole(&file, &below);
            used.extend(named(&inner, "super::super"));
            used.extend(named(&inner, path));
        }
        used.retain(|used| used != name && siblings.contains(used));
        uses.insert(name, used);
        look(&below, &own, &format!("{path}::{name}"), wrong);
    }
    for start in &siblings {
        let (mut reached, mut ways) = (BTreeSet::new(), vec![start.as_str()]);
        while let Some(from) = ways.pop() {
            for next in uses.get(from).into_iter().flatten() {
                if reached.insert(next.clone()) {
                    ways.push(next);
                }
            }
        }
        if reached.contains(start) {
            let used: Vec<_> = uses.get(start.as_str()).into_iter().flatten().collect();
            wrong.push(format!("{path}::{start} uses {used:?}, and is in a circle with one"));
        }
    }
}

/// What neither does I/O nor reads a clock nor draws a random number, whatever the time is and whatever it runs on.
const PURE: [&str; 30] = [
    "text.rs",
    "json.rs",
    "control/limits.rs",
    "word.rs",
    "cow_map.rs",
    "identity.rs",
    "model.rs",
    "descriptor.rs",
    "wiring.rs",
    "consumer.rs",
    "docker/answers.rs",
    "docker/container.rs",
    "docker/containers.rs",
    "docker/inspections.rs",
    "docker/read.rs",
    "docker/per_container.rs",
    "provider/bindings.rs",
    "discovery/docker/offers.rs",
    "discovery/docker/reach.rs",
    "balance.rs",
    "table.rs",
    "table/build.rs",
    "table/changes.rs",
    "path.rs",
    "kernel/again.rs",
    "kernel/layout.rs",
    "kernel/proofs.rs",
    "kernel/turns.rs",
    "capture/rules.rs",
    "capture/layout.rs",
];

#[test]
fn what_is_pure_reads_no_clock_and_touches_nothing() {
    const FORBIDDEN: [&str; 10] = [
        "Instant::now",
        "SystemTime",
        "fastrand",
        "std::fs",
        "fs::",
        "std::env",
        "tokio::",
        "TcpStream",
        "Command",
        "std::thread",
    ];
    let mut pure: Vec<_> = PURE.iter().map(|file| source().join(file)).collect();
    let judgement = source().join("judgement");
    pure.extend(
        declared(&code(&judgement.join("mod.rs"))).iter().map(|name| place(&judgement, name).0),
    );
    let mut wrong = Vec::new();
    for file in pure {
        let code = code(&file);
        let found = FORBIDDEN.iter().filter(|word| code.contains(*word));
        wrong.extend(found.map(|word| format!("{}: {word}", file.display())));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The crates that are in `Cargo.lock` more than once, with their versions.
fn repeated() -> BTreeMap<String, Vec<String>> {
    let lock = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock"));
    let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in lock.expect("there is a Cargo.lock").split("[[package]]") {
        let field = |name: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.strip_prefix(" = ")?.trim_matches('"').to_owned())
        };
        if let Some((name, version)) = field("name").zip(field("version")) {
            versions.entry(name).or_default().push(version);
        }
    }
    versions.retain(|_, versions| versions.len() > 1);
    versions
}

#[test]
fn no_crate_is_there_twice_except_for_those_that_deny_toml_names() {
    let deny = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deny.toml"));
    let deny = deny.expect("there is a deny.toml");
    let skipped = deny.split("skip = [").nth(1).and_then(|rest| rest.split("\n]").next());
    let skipped: BTreeSet<_> = skipped
        .expect("deny.toml has a list of them")
        .lines()
        .filter_map(|line| line.trim().strip_prefix("{ crate = \"")?.split('"').next())
        .collect();
    // One of the two is named, by the start of its version.
    let named = |(name, versions): (&String, &Vec<String>)| {
        let older: Vec<_> = versions
            .iter()
            .filter(|version| {
                let is_it = |skip: &&str| {
                    let (of, start) = skip.split_once('@').unwrap_or((skip, ""));
                    of == name && version.starts_with(&format!("{start}."))
                };
                !skipped.iter().any(is_it)
            })
            .collect();
        (older.len() > 1).then(|| format!("{name} {versions:?}"))
    };
    let repeated = repeated();
    let unnamed: Vec<_> = repeated.iter().filter_map(named).collect();
    assert!(unnamed.is_empty(), "say in deny.toml why these are there twice: {unnamed:#?}");
    let names: BTreeSet<_> = skipped.iter().map(|skip| skip.split('@').next()).collect();
    let gone: Vec<_> =
        names.iter().flatten().filter(|name| !repeated.contains_key(**name)).collect();
    assert!(gone.is_empty(), "these are there once: take them from deny.toml: {gone:?}");
}

#[test]
fn the_documents_name_no_source_file_that_is_not_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts: Vec<_> =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "bench/README.md", "testbed/README.md"]
            .map(|file| root.join(file))
            .into();
    for folder in ["docs", "docs/operations", "docs/decisions"] {
        let files = fs::read_dir(root.join(folder)).expect("the folder is there").flatten();
        texts.extend(
            files
                .map(|file| file.path())
                .filter(|file| file.extension().is_some_and(|e| e == "md")),
        );
    }
    let mut gone = Vec::new();
    for file in texts {
        let text = fs::read_to_string(&file).expect("a document can be read");
        let words = text.split(|c: char| !(c.is_alphanumeric() || "/._-".contains(c)));
        let paths = words
            .filter(|word| word.ends_with(".rs") && word.contains('/') && !word.starts_with("//"));
        let missing =
            paths.filter(|path| !root.join(path).exists() && !source().join(path).exists());
        gone.extend(missing.map(|path| format!("{}: {path}", file.display())));
    }
    assert!(gone.is_empty(), "{gone:#?}");
}
