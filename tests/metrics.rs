//! What the adapter tells Prometheus of itself, to whom, and the alerts that are made of it.

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;
use support::sysdig::Fault;
use support::{HPA, HPA_GROUPS, READ, Response, Setup, Stage, TOKEN, eventually, unix_now};

const PREFIX: &str = "sysdig_metrics_adapter_";
const SOON: Duration = Duration::from_secs(15);

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

/// True, and a line that says so, if there is no promtool here.
fn skipped() -> bool {
    let found = Command::new("promtool").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let why = "skipped: metrics and alerts before promtool need Debian's package: apt-get install prometheus";
    !found.is_ok_and(|status| status.success()) && writeln!(std::io::stderr(), "{why}").is_ok()
}

/// What promtool says about its input, which it must find right.
#[track_caller]
fn promtool(arguments: &[&str], input: &str) -> String {
    let mut command = Command::new("promtool");
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("promtool");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "promtool {arguments:?}: {said}");
    said
}

/// The samples, by name and labels, without what lies in every name.
#[track_caller]
fn samples(response: &Response) -> BTreeMap<String, f64> {
    assert_eq!(response.status, 200, "{}", response.text());
    assert_eq!(response.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let text = response.text();
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let sample = |line: &&str| {
        let (series, value) = line.rsplit_once(' ').expect(line);
        (series.trim_start_matches(PREFIX).to_owned(), value.parse().expect(line))
    };
    let samples: BTreeMap<_, _> = lines.iter().map(sample).collect();
    assert_eq!(samples.len(), lines.len(), "a series twice:\n{text}");
    samples
}

/// As one who may do everything, whom nobody needs to be asked about.
fn metrics(setup: &Setup) -> Response {
    setup.client.get_as("root", &["system:masters"], "/metrics")
}

fn scrape(setup: &Setup) -> BTreeMap<String, f64> {
    samples(&metrics(setup))
}

/// The counts of a histogram, by labels.
fn counts(samples: &BTreeMap<String, f64>, name: &str) -> BTreeMap<String, f64> {
    let count = format!("{name}_count");
    let of = |(series, value): (&String, &f64)| Some((series.strip_prefix(&count)?.to_owned(), *value));
    samples.iter().filter_map(of).collect()
}

fn request(route: &str, code: u16, reason: &str, waited_for: &str) -> String {
    format!(r#"{{route="{route}",code="{code}",reason="{reason}",waited_for="{waited_for}"}}"#)
}

/// An answer of the listener at `METRICS_ADDR`.
fn plain(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect(address);
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn each_request_counts_once_by_what_became_of_it() {
    let setup = Setup::start_with(binary, &[("REFRESH_INTERVAL", "30s".to_owned())]);
    let before = counts(&scrape(&setup), "request_duration_seconds");
    for _ in 0..4 {
        assert_eq!(setup.read(READ).status, 200);
    }
    assert_eq!(setup.read(&READ.replace("kuard/", "nobody/")).status, 404);
    assert_eq!(setup.read("/apis/custom.metrics.k8s.io/v1beta1").status, 200);
    assert_eq!(setup.read("/nowhere").status, 404);
    assert_eq!(setup.client.get(READ).status, 401);
    assert_eq!(setup.client.request("GET", READ, &[("Upgrade", "h2c")]).status, 400);
    assert_eq!(setup.client.request("POST", READ, &[("X-Remote-User", HPA)]).status, 405);
    let after = scrape(&setup);
    let counted = counts(&after, "request_duration_seconds");
    let more: BTreeMap<String, f64> = counted
        .iter()
        .map(|(labels, count)| (labels.clone(), count - before.get(labels).unwrap_or(&0.0)))
        .filter(|(labels, more)| *more > 0.0 && !labels.contains(r#"route="open""#))
        .collect();
    let expected = [
        // The first asks for the review and for Sysdig, the others for neither.
        (request("read", 200, "ok", "Sysdig"), 1.0),
        (request("read", 200, "ok", "Nothing"), 3.0),
        (request("read", 404, "object-not-found", "Sysdig"), 1.0),
        (request("read", 401, "unauthenticated", "Nothing"), 1.0),
        (request("none", 405, "method-not-allowed", "Nothing"), 1.0),
        (request("none", 404, "not-found", "Nothing"), 1.0),
        (request("door", 400, "invalid-request", "Nothing"), 1.0),
        // The first scrape counts in the second.
        (request("document", 200, "ok", "Nothing"), 1.0),
        (request("document", 200, "ok", "Reviews"), 1.0),
    ];
    let expected: BTreeMap<String, f64> = expected.into_iter().collect();
    assert_eq!(more, expected);
    let ages = counts(&after, "served_age_seconds");
    assert_eq!(ages, BTreeMap::from([(r#"{group="custom.metrics.k8s.io"}"#.to_owned(), 4.0)]));
    assert!(after[r#"served_age_seconds_sum{group="custom.metrics.k8s.io"}"#] >= 40.0, "ten seconds each at least");
}

#[test]
fn the_buckets_of_a_histogram_go_up_to_its_count() {
    let setup = Setup::start(binary);
    assert_eq!(setup.read(READ).status, 200);
    let text = metrics(&setup).text();
    let mut histograms = BTreeMap::<String, Vec<(f64, f64)>>::new();
    for line in text.lines().filter(|line| line.contains("_bucket{")) {
        let (series, count) = line.rsplit_once(' ').unwrap();
        let (labels, bound) = series.split_once(r#",le=""#).expect(line);
        let bound = bound.trim_end_matches("\"}").parse().expect(line);
        let buckets = histograms.entry(labels.replace("_bucket{", "_count{") + "}").or_default();
        buckets.push((bound, count.parse().unwrap()));
    }
    assert!(histograms.len() >= 4, "{text}");
    let samples = samples(&metrics(&setup));
    for (count, buckets) in &histograms {
        assert!(buckets.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1), "{count}: {buckets:?}");
        assert_eq!(buckets.last().unwrap().0, f64::INFINITY);
        assert!(samples[count.trim_start_matches(PREFIX)] >= buckets.last().unwrap().1, "{count}");
    }
}

#[test]
fn the_state_of_the_adapter_and_of_what_it_needs_shows() {
    let setup =
        Setup::start_with(binary, &[("REFRESH_INTERVAL", "1s".to_owned()), ("SDC_MAX_QUERIES_PER_MINUTE", "1000".to_owned())]);
    assert_eq!(setup.read(READ).status, 200);
    assert_eq!(setup.read(READ).status, 200);
    let now = scrape(&setup);
    assert_eq!(now[&format!("build_info{{version=\"{}\",config_hash=\"\"}}", env!("CARGO_PKG_VERSION"))], 1.0);
    assert_eq!(now[r#"connections{verified="true",busy="true"}"#], 1.0, "the scrape's own");
    assert_eq!(now[r#"connections{verified="false",busy="true"}"#], 0.0);
    assert_eq!(now[r#"queued_requests{pool="reviews"}"#], 0.0);
    assert_eq!(now[r#"queued_requests{pool="sysdig"}"#], 0.0);
    let entries = ["questions", "readings"].map(|of| now[&format!("store_entries{{of=\"{of}\"}}")]);
    assert_eq!(entries, [1.0, 1.0]);
    let left = now["sysdig_queries_left{}"];
    assert!((900.0..1000.0).contains(&left), "{left}");
    let days = (now["certificate_expiry_timestamp_seconds{}"] - unix_now() as f64) / 86_400.0;
    assert!((89.0..=90.0).contains(&days), "{days}");
    let queries = counts(&now, "sysdig_query_duration_seconds");
    assert!(queries[r#"{api="data",outcome="ok"}"#] >= 1.0, "{queries:?}");
    assert!(now[r#"outcomes_total{thing="Sysdig",reason="ok"}"#] >= 1.0);
    assert_eq!(now["config_reload_successful{}"], 1.0);
    let calls = counts(&now, "kubernetes_call_duration_seconds");
    assert!(calls[r#"{outcome="ok"}"#] >= 4.0, "{calls:?}");
    assert!(now["process_resident_memory_bytes{}"] > 1_000_000.0 && now["process_open_fds{}"] > 10.0);
    assert!(now["process_cpu_seconds_total{}"] < 60.0);

    setup.sysdig.fail(Fault::Status(503));
    let failures = r#"outcomes_total{thing="Sysdig",reason="backend-error"}"#;
    eventually("three failures show", SOON, || scrape(&setup).get(failures).is_some_and(|count| *count >= 3.0));
    let works = now[r#"outcomes_total{thing="Sysdig",reason="ok"}"#];
    let queries = counts(&scrape(&setup), "sysdig_query_duration_seconds");
    assert!(queries[r#"{api="data",outcome="backend-error"}"#] >= 3.0, "{queries:?}");
    setup.sysdig.heal();
    let again = || scrape(&setup)[r#"outcomes_total{thing="Sysdig",reason="ok"}"#] > works;
    eventually("that it works again shows, too", SOON, again);
}

#[test]
fn who_may_not_get_the_path_gets_no_metrics() {
    let stage = Stage::new();
    stage.kubernetes.authorize(|spec| {
        let path = &spec["nonResourceAttributes"];
        json!({ "allowed": spec["user"] == "prometheus" && path["path"] == "/metrics" && path["verb"] == "get" })
    });
    stage.kubernetes.user("scraper", "prometheus", &[]);
    stage.kubernetes.user("other", "joe", &[]);
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_ready(&setup.client);
    let bearer = |token: &str| setup.client.request("GET", "/metrics", &[("Authorization", token)]);
    let accept = ("Accept", "text/plain;version=0.0.4");
    assert_eq!(setup.client.get("/metrics").status, 401);
    assert_eq!(bearer("Bearer nobody").status, 401);
    assert_eq!(bearer("Bearer other").status, 403);
    assert_eq!(setup.client.get_as("joe", &[], "/metrics").status, 403);
    assert!(!samples(&bearer("Bearer scraper")).is_empty());
    assert!(!samples(&setup.client.get_as("prometheus", &[], "/metrics?a=b")).is_empty());
    let accepted = setup.client.request("GET", "/metrics", &[("Authorization", "Bearer scraper"), accept]);
    assert!(!samples(&accepted).is_empty(), "whatever form of text the scraper asks for");
    let posted = setup.client.request("POST", "/metrics", &[("Authorization", "Bearer scraper")]);
    assert_eq!(posted.status, 405);
}

#[test]
fn at_metrics_addr_there_are_metrics_for_anybody_and_nothing_else() {
    let setup = Setup::start_with(binary, &[("METRICS_ADDR", "127.0.0.1:0".to_owned())]);
    let log = setup.adapter.log();
    let (_, rest) = log.split_once("metrics on ").expect("the address is logged");
    let address = rest.lines().next().unwrap();
    let answer = plain(address, "/metrics");
    assert!(answer.starts_with("HTTP/1.0 200 ") && answer.contains("\nsysdig_metrics_adapter_build_info{"), "{answer}");
    for path in [READ, "/apis", "/", "/nowhere"] {
        let body = plain(address, path);
        let (_, body) = body.split_once("\r\n\r\n").expect("a body");
        assert!(body.starts_with("# HELP sysdig_metrics_adapter_build_info "), "{path}: {body}");
    }
    let taken = Stage::new();
    let mut env = taken.env();
    env.push(("METRICS_ADDR", address.to_owned()));
    let second = support::Adapter::spawn(binary(), &env);
    let status = second.wait_exit(SOON).expect("it ends");
    assert_eq!(status.code(), Some(1));
    assert!(second.log().contains(&format!("ERROR METRICS_ADDR: {address}: ")), "{}", second.log());
    let mut env = taken.env();
    env.push(("METRICS_ADDR", "9090".to_owned()));
    let third = support::Adapter::spawn(binary(), &env);
    assert_eq!(third.wait_exit(SOON).expect("it ends").code(), Some(2));
    assert!(third.log().contains("METRICS_ADDR"), "{}", third.log());
}

#[test]
fn silent_and_endless_clients_of_metrics_addr_hold_up_neither_scrapes_nor_the_adapter() {
    let setup = Setup::start_with(binary, &[("METRICS_ADDR", "127.0.0.1:0".to_owned())]);
    let log = setup.adapter.log();
    let address = log.split_once("metrics on ").and_then(|(_, rest)| rest.lines().next()).expect("it is logged");
    let (threads, descriptors) = (setup.adapter.threads(), setup.adapter.descriptors());
    let silent: Vec<_> = (0..300).map(|_| TcpStream::connect(address).unwrap()).collect();
    // The newest of them are still there when it comes.
    assert!(plain(address, "/metrics").contains("sysdig_metrics_adapter_build_info{"));
    let (more, open) = (setup.adapter.threads() - threads, setup.adapter.descriptors() - descriptors);
    assert!(more <= 10 && open <= 10, "{more} more threads, {open} more descriptors");
    let mut endless = TcpStream::connect(address).unwrap();
    endless.set_read_timeout(Some(SOON)).unwrap();
    let _ = endless.write_all(&vec![b'a'; 64 * 1024]);
    let mut answer = Vec::new();
    let _ = endless.read_to_end(&mut answer);
    assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
    drop(silent);
    assert!(plain(address, "/metrics").contains("sysdig_metrics_adapter_build_info{"));
    assert_eq!(setup.read(READ).status, 200);
}

#[test]
fn nothing_that_callers_send_makes_a_series_or_shows() {
    let stage = Stage::new();
    stage.kubernetes.user("callers-token", "callers-name", &["callers-group"]);
    let setup = stage.start(binary(), &[]);
    setup.adapter.wait_ready(&setup.client);
    let round = |index: usize| {
        let name = format!("hostile{index}");
        let base = "/apis/custom.metrics.k8s.io/v1beta1/namespaces";
        for path in [
            format!("{base}/default/services/{name}/net.http.request.count"),
            format!("{base}/default/{name}/kuard/net.http.request.count"),
            format!("{base}/{name}/services/kuard/{name}.count"),
            format!("{base}/default/services/kuard/%22{name}%0a"),
            format!("/{name}?{name}={name}"),
            format!("/metrics/{name}"),
        ] {
            assert!(setup.client.get_as(&name, &[&name], &path).status >= 400, "{path}");
        }
        let token = format!("Bearer {name}");
        for method in ["GET", &name.to_uppercase()] {
            let answer = setup.client.request(method, READ, &[("Authorization", &token), ("X-Hostile", &name)]);
            assert!(answer.status >= 400);
        }
        setup.client.request("GET", READ, &[("Authorization", "Bearer callers-token")]);
    };
    let started = r#"outcomes_total{thing="metric catalogue",reason="ok"}"#;
    eventually("the start is over", SOON, || scrape(&setup).contains_key(started));
    (0..2).for_each(round);
    let first = scrape(&setup);
    (2..12).for_each(round);
    let grown: Vec<_> = scrape(&setup).into_keys().filter(|series| !first.contains_key(series)).collect();
    assert_eq!(grown, Vec::<String>::new());
    let text = metrics(&setup).text();
    for word in ["hostile", "callers", TOKEN, "kuard", HPA, HPA_GROUPS[0], "net.http"] {
        assert!(!text.to_lowercase().contains(&word.to_lowercase()), "{word}:\n{text}");
    }
}

#[test]
fn promtool_finds_nothing_wrong_with_the_metrics() {
    if skipped() {
        return;
    }
    let setup = Setup::start_with(binary, &[("REFRESH_INTERVAL", "1s".to_owned())]);
    assert_eq!(setup.read(READ).status, 200);
    assert_eq!(promtool(&["check", "metrics"], &metrics(&setup).text()), "");
}

#[test]
fn the_alerts_are_raised_by_what_they_are_for() {
    if skipped() {
        return;
    }
    promtool(&["check", "rules", "docs/alerts.yaml"], "");
    promtool(&["test", "rules", "docs/alerts_test.yaml"], "");
}

#[test]
fn every_alert_is_tested_says_what_to_run_and_is_made_of_metrics_that_there_are() {
    let read = |file: &str| std::fs::read_to_string(format!("{}/{file}", env!("CARGO_MANIFEST_DIR"))).expect(file);
    let (rules, tests, families) = (read("docs/alerts.yaml"), read("docs/alerts_test.yaml"), read("src/metrics.txt"));
    let alerts: Vec<&str> = rules.split("- alert: ").skip(1).collect();
    assert!(alerts.len() >= 7, "{}", alerts.len());
    for alert in alerts {
        let name = alert.lines().next().unwrap();
        assert!(tests.contains(&format!("alertname: {name}\n")), "{name} has no test");
        for part in ["summary:", "command:", "severity:", "for:"] {
            assert!(alert.contains(part), "{name} has no {part}");
        }
    }
    let mut used = 0;
    for word in rules.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| word.starts_with(PREFIX)) {
        let family = ["_bucket", "_count", "_sum"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
        assert!(families.contains(&format!("# TYPE {family} ")), "{word}");
        used += 1;
    }
    assert!(used >= 7, "{used}");
}
