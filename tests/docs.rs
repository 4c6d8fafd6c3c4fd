//! The documents say what the source says: their lists are compared with it, their examples are tried.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sysdig_metrics_adapter::definitions::parse;
use sysdig_metrics_adapter::error::Reason;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    let path = root().join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn in_folder(folder: &str) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(root().join(folder)).expect(folder).map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).expect("a name")
}

/// The documents: those of the root and those in docs.
fn documents() -> Vec<PathBuf> {
    let at_root = in_folder("").into_iter().chain(in_folder("docs"));
    at_root.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

/// What stands behind `](` in running text, without what is an example.
fn links(document: &str) -> Vec<&str> {
    let text = document.split("```").step_by(2);
    text.flat_map(|text| text.split("](").skip(1)).filter_map(|rest| rest.split(')').next()).collect()
}

/// The anchors of a document's headings, as GitHub makes them.
fn anchors(document: &str) -> BTreeSet<String> {
    let text = document.split("```").step_by(2);
    let headings = text.flat_map(str::lines).filter(|line| line.starts_with('#'));
    let kept = |c: &char| c.is_alphanumeric() || "-_ ".contains(*c);
    let anchor = |line: &str| line.trim_start_matches('#').trim().to_lowercase().chars().filter(kept).collect();
    headings.map(anchor).map(|text: String| text.replace(' ', "-")).collect()
}

#[test]
fn the_reasons_are_those_of_the_source_in_its_order() {
    let document = read("docs/reasons.md");
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let documented: Vec<(String, String)> =
        rows.map(|(word, rest)| (word.to_owned(), rest.split_once(' ').expect(rest).0.to_owned())).collect();
    let rows = Reason::ALL.iter().map(|reason| reason.row());
    let expected: Vec<_> = rows.map(|(code, _, word)| (word.to_owned(), code.to_string())).collect();
    assert!(expected.len() > 20, "{expected:?}");
    assert_eq!(documented, expected);
}

/// The fields of a struct as they are spelt in a file.
fn fields_in_the_source(file: &str, name: &str) -> Vec<String> {
    let source = read(file);
    let start = format!("\npub struct {name} {{\n");
    let fields = source.split_once(&start).expect("the struct").1.split_once("\n}").expect("its end").0;
    let (mut names, mut skipped) = (Vec::new(), false);
    for line in fields.lines().map(str::trim).filter(|line| !line.starts_with("//")) {
        if let Some((name, _)) = line.strip_prefix("pub ").and_then(|line| line.split_once(": ")) {
            names.extend((!skipped).then(|| camel_case(name)));
        }
        skipped = line == "#[serde(skip)]";
    }
    names
}

fn camel_case(name: &str) -> String {
    let mut words = name.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |all, word| format!("{all}{}{}", word[..1].to_ascii_uppercase(), &word[1..]))
}

/// The structs that `CONFIG_FILE` is read into: where they are, and what the documents call them.
const DEFINED: [(&str, &str, &str, &str); 2] =
    [("src/definitions.rs", "Definition", "metric", "Fields"), ("src/route.rs", "Resource", "resource", "Custom resources")];

#[test]
fn the_schema_has_the_fields_that_the_source_reads() {
    let schema: Value = serde_json::from_str(&read("docs/definitions.schema.json")).unwrap();
    let described = |object: &Value| -> BTreeSet<String> {
        assert_eq!(object["additionalProperties"], json!(false), "an unknown field is a mistake for both");
        object["properties"].as_object().unwrap().keys().cloned().collect()
    };
    assert_eq!(described(&schema), fields_in_the_source("src/definitions.rs", "File").into_iter().collect());
    for (file, name, definition, _) in DEFINED {
        let fields = fields_in_the_source(file, name);
        assert!(fields.len() > 3, "{fields:?}");
        let object = &schema["$defs"][definition];
        assert_eq!(described(object), fields.into_iter().collect());
        // What the schema requires, the source does not do without.
        for field in object["required"].as_array().unwrap() {
            let mut least = json!({});
            for other in object["required"].as_array().unwrap().iter().filter(|other| *other != field) {
                least[other.as_str().unwrap()] = json!(if other == "apiVersion" { "g/v1" } else { "m" });
            }
            let mistake = parse(json!({ (format!("{definition}s")): [least] }).to_string().as_bytes()).unwrap_err();
            assert!(mistake.starts_with(&format!("missing field `{}`", field.as_str().unwrap())), "{mistake}");
        }
    }
}

#[test]
fn the_tables_of_fields_are_those_of_the_source_in_its_order() {
    let document = read("docs/definitions.md");
    for (file, name, _, heading) in DEFINED {
        let start = format!("\n## {heading}\n");
        let table = document.split_once(&start).expect("the table").1.split("\n## ").next().unwrap_or_default();
        let rows = table.lines().filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0));
        assert_eq!(rows.collect::<Vec<_>>(), fields_in_the_source(file, name));
    }
}

#[test]
fn every_example_of_definitions_is_accepted() {
    let document = read("docs/definitions.md");
    let mut examples: Vec<&str> = document.split("\n```json\n").skip(1).filter_map(|it| it.split("\n```").next()).collect();
    assert!(examples.len() > 4, "{}", examples.len());
    let component = read("manifests/components/definitions/definitions.json");
    examples.push(&component);
    for example in examples {
        let defined = parse(example.as_bytes()).unwrap_or_else(|mistake| panic!("{mistake}\n{example}"));
        assert!(!defined.metrics.is_empty(), "{example}");
    }
}

#[test]
fn every_setting_is_in_the_readme() {
    let (source, readme) = (read("src/config.rs"), read("README.md"));
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let is_name = |text: &&str| text.contains('_') && text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
    let quoted = source.lines().flat_map(|line| line.split('"').skip(1).step_by(2));
    let names: BTreeSet<&str> = quoted.filter(is_name).collect();
    assert!(names.len() > 20, "{names:?}");
    let table: Vec<&str> = readme.lines().filter(|line| line.starts_with("| `")).collect();
    for name in names {
        assert!(table.iter().any(|row| row.contains(&format!("`{name}`"))), "{name} has no row");
    }
}

#[test]
fn every_link_leads_somewhere() {
    let mut count = 0;
    for path in documents() {
        let document = fs::read_to_string(&path).unwrap();
        for link in links(&document).into_iter().filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            assert!(target.exists(), "{}: {link}", path.display());
            let known = anchor.is_empty() || anchors(&fs::read_to_string(&target).unwrap()).contains(anchor);
            assert!(known, "{}: {link} names no heading", path.display());
            count += 1;
        }
    }
    assert!(count > 40, "{count}");
}

/// Who runs a command of the documents: a file of ours and what stands in it; or why none does.
enum How {
    Run(&'static str, &'static str),
    Not(&'static str),
}

const CI: &str = ".ci/run";
const PLANE: &str = "tests/control_plane.rs";
const NO_REGISTRY: How = How::Not("there is no container registry, no docker and no kind where the tests run");
const OTHERS: How = How::Not("it is about another program's objects");
const LOOKS: How = How::Not("it only looks, at pods and logs that a control plane without nodes has none of");

/// Every command that the documents show begins like one of these; the first that fits counts.
const COMMANDS: &[(&str, How)] = &[
    ("cargo run --release --example demo", How::Run(CI, "cargo run --release --locked --example demo")),
    ("cargo run --release --example bench", How::Not("it takes half an hour, and writes what it measured")),
    ("cargo test --locked", How::Run(CI, "cargo test --locked")),
    ("cargo test --test control_plane", How::Run(CI, "cargo test --locked")),
    ("fuzz/run ", How::Run(CI, "fuzz/run ")),
    ("cargo tree -e normal --target", How::Run("tests/house.rs", "\"tree\", \"--locked\", \"--target\"")),
    ("docker ", NO_REGISTRY),
    ("kind load ", NO_REGISTRY),
    ("kubectl get --raw", How::Run(PLANE, "\"get\", \"--raw\"")),
    ("kubectl get hpa kuard -o json | kubectl exec -i", How::Run("tests/commands.rs", "[\"explain\", \"-\"]")),
    ("kubectl get hpa -A -o json | sysdig-metrics-adapter check", How::Run("tests/commands.rs", "[\"check\"]")),
    (
        "kubectl exec -n custom-metrics deployment/custom-metrics-apiserver -- /sysdig-metrics-adapter explain ",
        How::Run("tests/commands.rs", "[\"explain\", \"default/kuard\"]"),
    ),
    (
        "kubectl exec -n custom-metrics deployment/custom-metrics-apiserver -- /sysdig-metrics-adapter doctor",
        How::Run("tests/commands.rs", "[\"doctor\"]"),
    ),
    ("kubectl get hpa kuard-autoscaler", How::Run("tests/control_plane/load.rs", "\"get\", \"hpa\", \"kuard-autoscaler\"")),
    ("kubectl get hpa", How::Run("tests/control_plane/load.rs", "\"get\", \"hpa\"")),
    ("kubectl get namespace ", How::Run(PLANE, "\"get\", \"namespace\"")),
    ("kubectl get apiservice", How::Run(PLANE, "\"get\", \"apiservice\"")),
    ("kubectl get deployment,service,clusterrole,apiservice", OTHERS),
    ("kubectl get scaledobject", OTHERS),
    ("kubectl get pods", LOOKS),
    ("kubectl logs ", LOOKS),
    ("kubectl describe pod", LOOKS),
    ("kubectl set env deployment/", How::Not("it replaces pods, of which a control plane without nodes has none")),
    ("kubectl api-versions", How::Run(PLANE, "\"api-versions\"")),
    ("kubectl apply -f manifests/", How::Run(PLANE, "\"apply\", \"-f\"")),
    ("kubectl apply -f web-hpa.yaml", How::Not("the file is the reader's, made of the example before it")),
    ("kubectl apply -k .", How::Run(CI, "overlay | known_kinds")),
    ("kubectl kustomize . |", How::Run(CI, "overlay | known_kinds")),
    ("kubectl create secret generic --from-literal", How::Run(PLANE, "\"create\", \"secret\", \"generic\"")),
    ("kubectl create clusterrolebinding", How::Run(PLANE, "\"create\", \"clusterrolebinding\"")),
    ("kubectl port-forward", How::Not("there are no nodes to forward from")),
    ("ab -c 10", How::Not("there are no pods to load; the demo plays it")),
    ("curl -sk", How::Not("it goes through port-forward; tests/auth.rs asks the same with a token")),
    ("kubectl describe hpa", How::Run("tests/control_plane/load.rs", "\"describe\", \"hpa\"")),
    ("kubectl patch secret custom-metrics-apiserver-certificate", How::Run("tests/control_plane/trust.rs", "&[\"patch\"]")),
    ("kubectl patch apiservice ", How::Run(PLANE, "\"patch\", \"apiservice\"")),
    ("kubectl delete namespace", How::Run(PLANE, "\"delete\", \"namespace\"")),
    ("kubectl delete -k .", How::Not("it deletes what .ci/run renders out of the same files")),
    ("kubectl delete hpa -n shop", How::Not("it takes back what the reader made")),
    ("kubectl delete apiservice ", How::Run(PLANE, "\"delete\", \"apiservice\"")),
    ("kubectl delete -f manifests/", How::Run(PLANE, "\"delete\", \"-f\"")),
    ("kubectl delete deployment", OTHERS),
    ("kubectl delete scaledobject", OTHERS),
    ("kubectl delete clusterrolebinding try-it", How::Not("it takes back what the reader made")),
];

/// What a reader would run: behind a prompt, within a sentence or a table.
fn commands(document: &str) -> impl Iterator<Item = &str> {
    let prompted = document.lines().filter_map(|line| line.strip_prefix("$ "));
    let prose = document.split("```").step_by(2).flat_map(|prose| prose.split('`').skip(1).step_by(2));
    let programs = ["kubectl ", "cargo ", "docker ", "helm ", "curl ", "fuzz/run "];
    // Two words name a command and do not say what it shall do.
    let whole =
        move |it: &&str| programs.iter().any(|name| it.starts_with(name)) && (it.split(' ').count() > 2 || it.contains('/'));
    prompted.chain(prose.filter(whole))
}

#[test]
fn every_command_is_run_by_a_test_or_says_why_not() {
    let mut used = BTreeSet::new();
    for path in documents() {
        let document = fs::read_to_string(&path).unwrap();
        for command in commands(&document) {
            let found = COMMANDS.iter().position(|(start, _)| command.starts_with(start));
            used.insert(found.unwrap_or_else(|| panic!("{}: nobody runs: {command}", path.display())));
        }
        // What a reader would type stands behind a prompt, where it is found.
        let shell = document.split("```").skip(1).step_by(2).filter(|block| block.starts_with("console"));
        assert!(shell.into_iter().all(|block| block.contains("\n$ ")), "{}", path.display());
        assert!(!["```sh", "```bash", "```shell"].iter().any(|it| document.contains(it)), "{}", path.display());
    }
    for (index, (start, how)) in COMMANDS.iter().enumerate() {
        assert!(used.contains(&index), "no document shows: {start}");
        match how {
            How::Run(file, part) => assert!(read(file).contains(part), "{file} does not run: {start}"),
            How::Not(why) => assert!(why.len() > 20, "{start}: {why}"),
        }
    }
}

#[test]
fn every_component_is_in_the_readme() {
    let readme = read("README.md");
    let components = in_folder("manifests/components");
    assert!(components.len() > 2, "{components:?}");
    for component in components {
        let row = format!("\n| `{}` | ", name(&component));
        assert!(readme.contains(&row), "{} has no row", component.display());
    }
}

#[test]
fn every_file_of_the_source_is_on_the_map() {
    let document = read("ARCHITECTURE.md");
    let map = document.split_once("\n## Code map\n").expect("the map").1.split("\n## ").next().unwrap_or_default();
    let rows = map.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    let named: BTreeSet<&str> = rows.flat_map(|row| row.split('`')).filter(|name| name.contains('.')).collect();
    let files = in_folder("src");
    for file in files.iter().map(|path| name(path)) {
        let kind = if file.starts_with("openapi-") { "openapi-*.json" } else { file };
        assert!(named.contains(kind), "{file} is not on the map");
    }
    for name in named.iter().filter(|name| !name.contains('*')) {
        assert!(root().join("src").join(name).exists(), "{name} is not there");
    }
}
