//! The promises that an auditor relies on: few crates, few lines, no async runtime, every crate explained.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

const MOST_CRATES: usize = 50;
const MOST_CRATES_WITH_BUILD: usize = 55;
const MOST_LINES: usize = 4000;
const MOST_LINES_IN_A_FILE: usize = 500;
const OWNERS_CARD: [&str; 10] =
    ["env_logger", "log", "rcgen", "rustls", "rustls-webpki", "serde", "serde_json", "signal-hook", "tiny_http", "ureq"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn crates(edges: &str, depth: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--target", "x86_64-unknown-linux-gnu", "--prefix", "none", "--format", "{p}"])
        .args(["-e", edges, "--depth", depth])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let names = text.lines().filter_map(|line| line.split(' ').next()).filter(|name| !name.is_empty());
    names.filter(|name| *name != env!("CARGO_PKG_NAME")).map(str::to_owned).collect()
}

fn lines_before_tests(source: &str) -> usize {
    source.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count()
}

#[test]
fn the_dependencies_are_those_of_the_card() {
    let direct: Vec<String> = crates("normal,build,dev", "1").into_iter().collect();
    assert_eq!(direct, OWNERS_CARD);
}

#[test]
fn the_number_of_crates_stays_below_its_ceiling() {
    let (normal, all) = (crates("normal", "99").len(), crates("normal,build", "99").len());
    assert!((OWNERS_CARD.len()..=MOST_CRATES).contains(&normal), "{normal} crates");
    assert!((normal..=MOST_CRATES_WITH_BUILD).contains(&all), "{all} crates with build dependencies");
}

#[test]
fn every_crate_has_its_reason() {
    let reasons = fs::read_to_string(root().join("docs/dependencies.md")).unwrap();
    let rows: BTreeSet<String> =
        reasons.lines().filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned())).collect();
    let found = crates("normal,build", "99");
    assert_eq!(found.difference(&rows).collect::<Vec<_>>(), Vec::<&String>::new(), "without a row");
    assert_eq!(rows.difference(&found).collect::<Vec<_>>(), Vec::<&String>::new(), "not in the tree any more");
}

#[test]
fn there_is_no_async_runtime() {
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for runtime in ["tokio", "async-std", "smol", "hyper", "futures-executor"] {
        assert!(!lock.contains(&format!("name = \"{runtime}\"")), "{runtime}");
    }
}

#[test]
fn the_source_can_be_read_in_an_evening() {
    let mut total = 0;
    for entry in fs::read_dir(root().join("src")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let lines = lines_before_tests(&fs::read_to_string(&path).unwrap());
            assert!(lines <= MOST_LINES_IN_A_FILE, "{} has {lines} lines", path.display());
            total += lines;
        }
    }
    assert!((1000..=MOST_LINES).contains(&total), "src has {total} lines");
}
