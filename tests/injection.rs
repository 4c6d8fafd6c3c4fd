//! Hostile values in names, labels, selectors and definitions never widen what Sysdig is asked, in either language:
//! they are refused, or stand as one whole string in a query that is otherwise that for a harmless value.

mod support;

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use support::http::{HttpServer, Reply, lock};
use support::{Setup, Stage, TOKEN};
use sysdig_metrics_adapter::config::Config;
use sysdig_metrics_adapter::definitions::parse;
use sysdig_metrics_adapter::error::Reason;
use sysdig_metrics_adapter::route::Resource;
use sysdig_metrics_adapter::selector::{Operator, Requirement, Tuning};
use sysdig_metrics_adapter::sysdig::{Question, Scope, Sysdig};

const NOW: u64 = 1_800_000_000;
const LEAST: usize = 200;
const HARMLESS: &str = "harmless";

/// What could end a string, a list, a filter or a query, or mean more than itself, in one language or the other.
fn hostile() -> BTreeSet<String> {
    let pieces = [
        "'",
        "\"",
        "`",
        "\\",
        "\\\\",
        "\\'",
        "\\\"",
        "\\x22",
        "\\u0022",
        "''",
        "\"\"",
        "' or 'a' = 'a",
        "' or kubernetes.cluster.name != '",
        "') or (kubernetes.cluster.name = 'other",
        "', 'other",
        "\"} or up{a=\"",
        "\"} or {__name__=~\".+\"} or up{a=\"",
        "\",kube_cluster_name=~\".*\",x=\"",
        "\"}[5m]) or (up{x=\"",
        ") or (",
        "}",
        "{",
        "[1h]",
        "|",
        "|other",
        ".*",
        ".+",
        "[^x]",
        "^",
        "(?i)",
        "x{0,9}",
        "?",
        "*",
        "#",
        "//",
        "--",
        "/*",
        ";",
        ",",
        "=",
        "!=",
        "=~",
        "@ 0",
        " offset 1d",
        "$matchers",
        "$window",
        "$by",
        "\n",
        "\r",
        "\t",
        "\u{0}",
        "\u{7f}",
        "\u{2028}",
        "é",
        "\u{ff07}",
        "%27",
        "%",
        " and ",
        " null",
    ];
    let places = ["{}", "a{}", "{}a", "a{}b"];
    let all: BTreeSet<_> = pieces.iter().flat_map(|piece| places.iter().map(move |place| place.replace("{}", piece))).collect();
    assert!(all.len() >= LEAST, "{}", all.len());
    all
}

/// A query without the contents of its strings, and these as they stand.
fn strings(query: &str) -> (String, Vec<String>) {
    let (mut skeleton, mut strings, mut chars) = (String::new(), Vec::new(), query.chars());
    while let Some(quote) = chars.next() {
        skeleton.push(quote);
        if !['"', '\''].contains(&quote) {
            continue;
        }
        let mut content = String::new();
        loop {
            match chars.next().unwrap_or_else(|| panic!("a string is not closed: {query}")) {
                // Sysdig's filters have no escapes, and our strings in PromQL are in double quotes.
                '\\' if quote == '"' => content.extend(['\\', chars.next().expect("something is escaped")]),
                '\n' => panic!("a string over two lines: {query}"),
                c if c == quote => break,
                c => content.push(c),
            }
        }
        skeleton.push(quote);
        strings.push(content);
    }
    (skeleton, strings)
}

/// The text that a string of PromQL, which is a pattern, stands for; None if it stands for more than one.
fn matched(content: &str) -> Option<String> {
    // Such a string without \u and \x escapes is one of JSON, too.
    let pattern: String = serde_json::from_str(&format!("\"{}\"", content.replace('\t', "\\t"))).ok().or_else(|| {
        let raw = content.replace("\\\\", "\u{1}").replace("\\\"", "\"").replace("\\n", "\n");
        Some(raw.replace('\u{1}', "\\"))
    })?;
    let (mut text, mut chars) = (String::new(), pattern.chars());
    while let Some(c) = chars.next() {
        let escaped = c == '\\';
        let c = if escaped { chars.next()? } else { c };
        if !escaped && ".+*?()|[]{}^$".contains(c) {
            return None;
        }
        text.push(c);
    }
    Some(text)
}

/// Sysdig's paths, of which each query is kept.
struct Recorder {
    _server: HttpServer,
    queries: Arc<Mutex<Vec<String>>>,
    endpoint: String,
}

impl Recorder {
    fn start() -> Self {
        let queries = Arc::<Mutex<Vec<String>>>::default();
        let kept = Arc::clone(&queries);
        let server = HttpServer::start(None, move |request| {
            let body = String::from_utf8(request.body.clone()).expect("text");
            if request.route() == "/api/data" {
                let body: Value = serde_json::from_str(&body).expect("JSON");
                lock(&kept).push(body["filter"].as_str().expect("a filter").to_owned());
                return Reply::json(200, &json!({ "data": [] }));
            }
            let form = [request.query(), support::http::form(&body)].concat();
            lock(&kept).extend(form.into_iter().find(|(name, _)| name == "query").map(|(_, query)| query));
            Reply::json(200, &json!({ "status": "success", "data": { "resultType": "vector", "result": [] } }))
        });
        let endpoint = format!("http://127.0.0.1:{}", server.port());
        Self { _server: server, queries, endpoint }
    }

    /// Sysdig for a cluster of that name; None if such a name is refused.
    fn sysdig(&self, cluster: &str) -> Option<Sysdig> {
        let config = Config::read(|name| match name {
            "SDC_ENDPOINT" => Some(Ok(self.endpoint.clone())),
            "SDC_TOKEN" => Some(Ok(TOKEN.to_owned())),
            "CLUSTER_NAME" => Some(Ok(cluster.to_owned())),
            _ => None,
        });
        Some(Sysdig::new(&config.ok()?).expect("there is no file to read"))
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.queries))
    }
}

/// Where a value can stand in a question, whatever lets it get so far.
const PLACES: [&str; 5] = ["cluster", "namespace", "name", "label", "labels"];

/// What Sysdig is asked with this value in that place. None if it is refused.
fn asked(recorder: &Recorder, metric: &str, place: &str, value: &str) -> Option<Vec<String>> {
    let at = |here: &str, other: &str| if place == here { value.to_owned() } else { other.to_owned() };
    let labels = Requirement { key: "b".to_owned(), operator: Operator::NotIn, values: vec!["c".to_owned(), at("labels", "d")] };
    let question = Question {
        metric: metric.to_owned(),
        tuning: Tuning { time: "avg", group: "sum", window: 60 },
        resource: &Resource::PODS,
        legacy: false,
        labels: vec![Requirement::is("a", [at("label", "e")]), labels],
    };
    let scope: Scope = [(at("namespace", "shop"), at("name", "web-0"))].into_iter().unzip();
    let sysdig = recorder.sysdig(&at("cluster", "blue"))?;
    let rows = sysdig.rows(&question, &scope, NOW);
    let collected = sysdig.is_collected(&question, NOW);
    let queries = recorder.take();
    if let Err(error) = rows {
        let unset = place == "cluster" && value.trim().is_empty();
        let reason = if unset { Reason::NotConfigured } else { Reason::InvalidRequest };
        assert_eq!(error.reason, reason, "{place} {value:?}: {}", error.message);
        // Whether the metric is collected at all is no question about this value.
        assert!(queries.iter().all(|it| it == "kubernetes.cluster.name = 'blue'"), "{place} {value:?}: {queries:?}");
        return None;
    }
    assert!(collected.is_ok());
    Some(queries)
}

#[test]
fn in_promql_a_value_is_one_string_for_itself_in_the_query_for_a_harmless_one() {
    let recorder = Recorder::start();
    let template = "sum by ($by) (rate(a_total{$matchers,c=\"d\"}[$window])) / sum by ($by) (rate(b{$matchers}[$window]))";
    let mut sent = 0;
    for metric in ["queue_depth", "sysdig_container_net_http_request_count", template] {
        for place in PLACES {
            let harmless = asked(&recorder, metric, place, HARMLESS).expect(HARMLESS);
            let first = &harmless[0];
            let scope = r#"{kube_cluster_name=~"",kube_namespace_name=~"",kube_pod_name=~"""#;
            let skeleton = strings(first).0;
            assert_eq!(skeleton.matches('{').count(), skeleton.matches(scope).count(), "{skeleton}");
            for value in hostile() {
                let Some(queries) = asked(&recorder, metric, place, &value) else {
                    assert_eq!(place, "cluster", "{value:?}");
                    continue;
                };
                assert_eq!(queries.len(), harmless.len());
                for (query, harmless) in queries.iter().zip(&harmless) {
                    let ((skeleton, contents), (expected, wanted)) = (strings(query), strings(harmless));
                    assert_eq!(skeleton, expected, "{place} {value:?}");
                    for (content, wanted) in contents.iter().zip(&wanted) {
                        match wanted.strip_suffix(HARMLESS) {
                            None => assert_eq!(content, wanted, "{place} {value:?}"),
                            Some(before) => {
                                let own = content.strip_prefix(before).expect("what comes before is the same");
                                assert_eq!(matched(own).as_deref(), Some(value.trim_matches(trimmed(place))), "{query}");
                            }
                        }
                    }
                }
                sent += 1;
            }
        }
    }
    assert!(sent > 10 * LEAST, "{sent}");
}

/// A setting's text is trimmed, a label's is not.
fn trimmed(place: &str) -> fn(char) -> bool {
    if place == "cluster" { char::is_whitespace } else { |_| false }
}

#[test]
fn in_the_data_api_a_value_is_one_string_for_itself_or_is_refused() {
    let recorder = Recorder::start();
    let (mut sent, mut refused) = (0, 0);
    for place in PLACES {
        let harmless = asked(&recorder, "net.http.request.count", place, HARMLESS).expect(HARMLESS);
        let scope = "kubernetes.cluster.name = '' and kubernetes.namespace.name = '' and kubernetes.pod.name = '' and ";
        assert!(strings(&harmless[0]).0.starts_with(scope), "{harmless:?}");
        for value in hostile() {
            let Some(queries) = asked(&recorder, "net.http.request.count", place, &value) else {
                refused += 1;
                continue;
            };
            assert_eq!(queries.len(), harmless.len());
            for (query, harmless) in queries.iter().zip(&harmless) {
                assert!(!query.contains(['\\', '"']), "{query}");
                let ((skeleton, contents), (expected, wanted)) = (strings(query), strings(harmless));
                assert_eq!(skeleton, expected, "{place} {value:?}");
                let own = value.trim_matches(trimmed(place));
                let wanted = wanted.iter().map(|it| if it == HARMLESS { own } else { it });
                assert_eq!(contents, wanted.collect::<Vec<_>>(), "{place} {value:?}");
            }
            sent += 1;
        }
    }
    assert!(sent + refused >= PLACES.len() * LEAST && refused > LEAST, "{sent} {refused}");
}

#[test]
fn no_definition_reads_anything_outside_of_its_scope() {
    let recorder = Recorder::start();
    let harmless = "sum by ($by) (rate(a{$matchers}[$window]))";
    let places = [
        "sum by ($by) (rate(a{$matchers,x=\"H\"}[$window]))",
        "sum by ($by) (rate(a{$matchersH}[$window]))",
        "sum by ($by) (rate(a{$matchers,H}[$window]))",
        "sum by ($by) (rate(a{H,$matchers}[$window]))",
        "sum by ($by) (rate(a{$matchers}[$window]H))",
        "sum by ($by) (rate(a{$matchers}[$window])H)",
        "sum by ($by) (rate(aH{$matchers}[$window]))",
        "sum by (H, $by) (rate(a{$matchers}[$window]))",
        "H sum by ($by) (rate(a{$matchers}[$window]))",
        "sum by ($by) (rate(a{$matchers}[$window])) H",
        "sum by ($by) (rate(a{$matchers}[$window])) or H",
        "sum by ($by) (rate(a{$matchers}[$window])) or (H)",
    ];
    let selects = [" up", " or up", " or (up)", " + b[5m]", " or up{}", "b{x=\"y\"}", "{__name__=~\".+\"}", " @ 0", "offset 1d"];
    let values: BTreeSet<String> = hostile().into_iter().chain(selects.map(str::to_owned)).collect();
    let (mut accepted, mut refused) = (0, 0);
    for (value, place) in values.iter().flat_map(|value| places.iter().map(move |place| (value, place))) {
        let template = place.replace('H', value);
        let file = |metric: &str, selector: &str| {
            json!({ "metrics": [{ "name": "m", "metric": metric, "selector": selector }] }).to_string()
        };
        assert!(
            parse(file(value, "").as_bytes()).is_err() || value.chars().all(|c| c.is_ascii_alphanumeric() || "_.:-".contains(c))
        );
        let label = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-/".contains(c));
        for selector in [format!("a={value}"), format!("{value}=a"), format!("a in (b,{value})"), value.clone()] {
            let found = parse(file("m", &selector).as_bytes()).map(|it| it.metrics[0].selector.clone()).unwrap_or_default();
            assert!(found.iter().all(|it| label(&it.key) && it.values.iter().all(|it| label(it))), "{selector}: {found:?}");
        }
        for field in ["kind", "plural", "apiVersion", "label"] {
            let mut queue = json!({ "kind": "Queue", "plural": "queues", "apiVersion": "a/v1", "label": "queue" });
            queue[field] = json!(value);
            let found = parse(json!({ "resources": [queue] }).to_string().as_bytes());
            assert!(found.is_err() || value.chars().all(|c| label(&c.to_string()) || c == ':'), "{field}: {value}");
        }
        let Ok(file) = parse(file(&template, "").as_bytes()) else {
            refused += 1;
            continue;
        };
        accepted += 1;
        let queries = asked(&recorder, &file.metrics[0].metric, "name", "web-0").expect(&template);
        let expected = asked(&recorder, harmless, "name", "web-0").expect(harmless);
        // Beside what the harmless template has, there are operators, numbers and labels in lists, and nothing is selected.
        let (query, expected) = (strings(&queries[0]).0, strings(&expected[0]).0);
        assert_eq!(selected(&query), selected(&expected), "{template:?}: {query}");
        assert!(!query.contains(['@', '#', '`', '$', '\n']), "{template:?}: {query}");
    }
    assert!(refused > LEAST && accepted > 0, "{accepted} accepted, {refused} refused");
}

/// Of a query without the contents of its strings: what stands between braces and after, up to the scope, and each word
/// that begins neither a call nor a group nor stands in a list, which is a metric.
fn selected(query: &str) -> (Vec<String>, BTreeSet<String>) {
    let scope = r#"kube_cluster_name=~"",kube_namespace_name=~"",kube_pod_name=~"""#;
    let selections = query.split('{').skip(1).map(|part| {
        let (inside, after) = part.split_once('}').unwrap_or_else(|| panic!("{query}"));
        assert!(inside.starts_with(scope) && !inside.contains(['(', ')', '[', ' ']), "{query}");
        let range = after.split_once(']').map(|(range, _)| range).filter(|_| after.starts_with('[')).unwrap_or_default();
        range.to_owned()
    });
    let word = |c: char| c.is_ascii_alphanumeric() || "_:".contains(c);
    let plain: String =
        query.split('{').map(|part| part.split_once('}').map_or(part, |(_, after)| after)).collect::<Vec<_>>().join("{");
    let (mut bare, mut rest) = (BTreeSet::new(), plain.as_str());
    while let Some(start) = rest.find(word) {
        let from = rest.split_at(start).1;
        let (name, after) = from.split_at(from.find(|c| !word(c)).unwrap_or(from.len()));
        let next = after.trim_start();
        let grouped = next.starts_with("by (");
        let listed = after.split_once(')').is_some_and(|(list, _)| list.chars().all(|c| word(c) || ", ".contains(c)));
        let number = name.starts_with(|c: char| c.is_ascii_digit());
        if !(next.starts_with('(') || next.starts_with('{') || grouped || listed || number) {
            bare.insert(name.to_owned());
        }
        rest = after;
    }
    (selections.collect(), bare)
}

fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// Asks for each of the hostile values in each place of a request, and expects a refusal.
fn read_all(setup: &Setup) {
    let base = "/apis/custom.metrics.k8s.io/v1beta2/namespaces";
    let mut sent = 0;
    for value in hostile() {
        let value = encoded(&value);
        for path in [
            format!("default/pods/{value}/queue.depth"),
            format!("default/deployments.apps/{value}/queue_depth"),
            format!("default/services/deployment;{value}/queue_depth"),
            format!("default/{value}/kuard/queue_depth"),
            format!("default/pods/kuard-0/{value}"),
            format!("{value}/pods/kuard-0/queue_depth"),
            format!("default/pods/kuard-0/queue_depth?metricLabelSelector={value}%3Da"),
            format!("default/pods/kuard-0/queue_depth?metricLabelSelector=a+in+%28b%2C{value}%29%29"),
            format!("default/pods/kuard-0/queue_depth?metricLabelSelector=sysdig%2Fwindow%3D{value}"),
        ] {
            let response = setup.read(&format!("{base}/{path}"));
            assert!((400..500).contains(&response.status), "{path}: {}", response.text());
            sent += 1;
        }
        // This may be a valid selector (a blank at its end is none of it), and is asked for besides then.
        let path = format!("{base}/default/pods/kuard-0/queue_depth?metricLabelSelector=a%3D{value}");
        assert!((400..500).contains(&setup.read(&path).status), "{path}");
        sent += 1;
    }
    assert!(sent >= 10 * LEAST, "{sent}");
}

#[test]
fn what_callers_send_is_refused_or_asked_for_within_the_scope_by_the_program_with_both_apis() {
    for backend in ["data", "promql"] {
        let recorder = Recorder::start();
        let endpoint = recorder.endpoint.clone();
        let binary = Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"));
        let settings = [("SDC_ENDPOINT", endpoint), ("SDC_BACKEND", backend.to_owned())];
        let setup = Stage::new().start(binary, &settings);
        setup.adapter.wait_ready(&setup.client);
        read_all(&setup);
        // These may be asked for, since they widen nothing.
        for other in ["kubernetes.namespace.name", "kube_namespace_name", "kubernetes.cluster.name", "kube_cluster_name"] {
            for operator in ["%3Dother", "%21%3Ddemo", "+notin+%28demo%29", ""] {
                let path = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default/pods/kuard-0/queue_depth";
                let response = setup.read(&format!("{path}?metricLabelSelector={other}{operator}"));
                assert_eq!(response.status, 404, "{}", response.text());
            }
        }
        let queries = recorder.take();
        assert!(queries.len() >= 16, "{backend}: {}", queries.len());
        for query in queries {
            let (skeleton, contents) = strings(&query);
            let (opens, scope) = match backend {
                "data" => (1, "kubernetes.cluster.name = '' and kubernetes.namespace.name = '' and kubernetes."),
                _ => (skeleton.matches('{').count(), r#"{kube_cluster_name=~"",kube_namespace_name=~"",kube_"#),
            };
            assert_eq!(skeleton.matches(scope).count(), opens, "{query}");
            assert!(!skeleton.contains(" or kubernetes"), "{query}");
            // `*` is a name, too: that of all pods, which are asked for one by one.
            assert_eq!(contents[..2], ["demo", "default"], "{query}");
            assert!(contents[2].starts_with("kuard"), "{query}");
        }
    }
}
