//! Readings that are remembered: warm ones are served at once whatever happens to Sysdig, all are asked for sparingly,
//! and none is older than it says.

#[path = "support/prometheus.rs"]
mod prometheus;
mod support;

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use prometheus::{Prometheus, Samples, missing};
use serde_json::{Value, json};
use support::sysdig::Fault;
use support::{HPA, HPA_GROUPS, METRIC, READ, Response, Setup, Stage, TOKEN, eventually, poll, unix_now};

const BASE: &str = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/default";
/// For what takes some refreshes, on a machine that runs other tests meanwhile.
const SOON: Duration = Duration::from_secs(15);

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_sysdig-metrics-adapter"))
}

fn start(stage: Stage, overrides: &[(&'static str, &str)]) -> Setup {
    let overrides: Vec<_> = overrides.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    let setup = stage.start(binary(), &overrides);
    setup.adapter.wait_ready(&setup.client);
    eventually("the catalogue has been read", SOON, || setup.adapter.log().contains("metric catalogue") || listed(&setup));
    setup
}

/// Whether the adapter knows the names of Sysdig's metrics, so that what arrives there from now on is of reads.
fn listed(setup: &Setup) -> bool {
    setup.sysdig.request_count() > 0 && setup.read("/apis/custom.metrics.k8s.io/v1beta2").text().contains(METRIC)
}

/// Reason word and message of a refusal.
#[track_caller]
fn refusal(response: &Response) -> (String, String) {
    assert!(response.status >= 400, "{}", response.text());
    let status = response.json();
    let text = |pointer: &str| status.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    (text("/details/causes/0/reason"), text("/message"))
}

/// Asks until the reading is kept fresh.
#[track_caller]
fn warm(setup: &Setup, path: &str) -> Response {
    for _ in 0..2 {
        assert_eq!(setup.read(path).status, 200, "{path}: {}", setup.read(path).text());
    }
    setup.read(path)
}

fn stamp(response: &Response) -> String {
    response.json()["items"][0]["timestamp"].as_str().unwrap().to_owned()
}

/// How often the metric has been asked for.
fn asked_for(setup: &Setup, metric: &str) -> usize {
    let is = |query: &Value| query["metrics"].as_array().unwrap().iter().any(|column| column["id"] == metric);
    setup.sysdig.queries().iter().filter(|query| is(query)).count()
}

/// A stage with `my.metric.0` and so on, all of `kuard`'s pods.
fn with_metrics(count: usize) -> Stage {
    let stage = Stage::new();
    for index in 0..count {
        stage.sysdig.world().set("default", "kuard", &format!("my.metric.{index}"), index as f64);
    }
    stage
}

fn read_of(metric: &str) -> String {
    format!("{BASE}/services/kuard/{metric}")
}

#[test]
fn a_warm_read_asks_neither_sysdig_nor_kubernetes() {
    let setup = start(Stage::new(), &[("REFRESH_INTERVAL", "1m")]);
    let first = warm(&setup, READ);
    // The certificate and the request header configuration are followed meanwhile.
    let of_reads = |request: &String| !["secrets", "configmaps", "apiservices"].iter().any(|it| request.contains(it));
    let counts = || {
        let kubernetes = setup.kubernetes.requests().iter().filter(|request| of_reads(request)).count();
        (setup.sysdig.request_count(), kubernetes)
    };
    let before = counts();
    let mut connection = setup.client.connect();
    for _ in 0..200 {
        let response = connection.get_as(HPA, &HPA_GROUPS, READ);
        assert_eq!((response.value(), stamp(&response)), ("50".to_owned(), stamp(&first)));
    }
    assert_eq!(counts(), before);
}

#[test]
fn a_value_is_refreshed_in_the_background_and_shows_its_own_time() {
    let setup = start(Stage::new(), &[("REFRESH_INTERVAL", "1s")]);
    let first = warm(&setup, READ);
    setup.sysdig.world().set("default", "kuard", METRIC, 70.0);
    eventually("the new value is served", SOON, || setup.read(READ).value() == "70");
    eventually("its time goes on", SOON, || stamp(&setup.read(READ)) > stamp(&first));
}

#[test]
fn samples_that_arrive_late_by_half_a_minute_are_served_without_a_gap_over_few_connections() {
    let setup = start(Stage::new(), &[("REFRESH_INTERVAL", "1s"), ("MAX_AGE", "60s")]);
    setup.sysdig.fail(Fault::Stale(30));
    warm(&setup, READ);
    let before = setup.sysdig.request_count();
    let mut connection = setup.client.connect();
    eventually("it is refreshed five times", SOON, || {
        let response = connection.get_as(HPA, &HPA_GROUPS, READ);
        assert_eq!(response.status, 200, "{}", response.text());
        assert_eq!(response.value(), "50");
        setup.sysdig.request_count() >= before + 5
    });
    // One for each refresher and one for the catalogue at the most.
    assert!(setup.sysdig.server().connections() <= 5, "{}", setup.sysdig.server().connections());
}

#[test]
fn concurrent_first_asks_for_one_reading_are_one_query() {
    let setup = start(Stage::new(), &[("REFRESH_INTERVAL", "1m")]);
    setup.sysdig.fail(Fault::Hold);
    thread::scope(|scope| {
        let asking: Vec<_> = (0..16).map(|_| scope.spawn(|| setup.read(READ).value())).collect();
        eventually("Sysdig is asked", SOON, || setup.sysdig.held() == 1);
        setup.sysdig.heal();
        assert!(asking.into_iter().all(|thread| thread.join().unwrap() == "50"));
    });
    assert_eq!(setup.sysdig.queries().len(), 1);
}

#[test]
fn sixty_objects_of_a_metric_are_a_handful_of_queries_and_then_one_for_each_refresh() {
    const COUNT: usize = 60;
    let stage = Stage::new();
    stage.deployment("default", "kuard", COUNT, &[(METRIC, 50.0)]);
    let setup = start(stage, &[("REFRESH_INTERVAL", "5s"), ("SDC_TIMEOUT", "30s")]);
    let pods: Vec<String> = (0..COUNT).map(|index| format!("kuard-{index}")).collect();
    let read = |pod: &String| setup.read(&format!("{BASE}/pods/{pod}/{METRIC}")).value();
    setup.sysdig.fail(Fault::Hold);
    thread::scope(|scope| {
        for pod in &pods {
            let setup = &setup;
            // Until it is known that the query goes on, and not only that there is no place to wait.
            let waits = |response: &Response| refusal(response).0 == "backend-timeout";
            let path = format!("{BASE}/pods/{pod}/{METRIC}");
            scope.spawn(move || {
                assert!(poll(Duration::from_secs(60), || waits(&setup.read(&path)).then_some(())).is_some());
            });
        }
    });
    assert_eq!((setup.sysdig.held(), setup.sysdig.queries().len()), (1, 0), "one query is under way");
    setup.sysdig.heal();
    eventually("all have been answered", SOON, || pods.iter().all(|pod| read(pod) == "50"));
    let first = setup.sysdig.queries().len();
    assert!(first <= 3, "{first} queries");
    assert!(pods.iter().all(|pod| read(pod) == "50"));

    let (before, since) = (setup.sysdig.queries().len(), Instant::now());
    let patience = Duration::from_secs(40);
    eventually("there are more refreshes", patience, || setup.sysdig.queries().len() >= before + 4);
    // The first may have been under way already.
    let refreshes: Vec<Value> = setup.sysdig.queries().into_iter().skip(before + 1).collect();
    for query in &refreshes {
        let filter = query["filter"].as_str().unwrap();
        assert!(pods.iter().all(|pod| filter.contains(&format!("'{pod}'"))), "{filter}");
    }
    assert!(refreshes.len() as u64 <= since.elapsed().as_secs() / 5 + 1, "{} refreshes", refreshes.len());
    setup.sysdig.world().set("default", "kuard", METRIC, 51.0);
    eventually("all of them are fresh", SOON, || pods.iter().all(|pod| read(pod) == "51"));
}

#[test]
fn more_than_a_thousand_objects_are_read_in_pages() {
    const COUNT: usize = 1100;
    let stage = Stage::new();
    stage.deployment("default", "kuard", COUNT, &[(METRIC, 50.0)]);
    stage.deployment("elsewhere", "kuard", 3, &[(METRIC, 7.0)]);
    let setup = start(stage, &[("REFRESH_INTERVAL", "1s")]);
    let all = || setup.read(&format!("{BASE}/pods/*/{METRIC}?labelSelector=app%3Dkuard")).values();
    let lists = setup.kubernetes.counter_of("/pods");
    assert_eq!(all().len(), COUNT);
    let queries = setup.sysdig.queries();
    let pages: Vec<&Value> = queries.iter().map(|query| &query["paging"]).collect();
    assert_eq!(pages, [&json!({ "from": 0, "to": 999 }), &json!({ "from": 1000, "to": 1999 })]);
    assert_eq!(setup.kubernetes.counter_of("/pods") - lists, 3, "pages of 500");
    // Too many to be named: their namespace stands for them.
    assert!(!queries[0]["filter"].as_str().unwrap().contains("kubernetes.pod.name"), "{}", queries[0]);
    assert!(all().values().all(|value| value == "50"));
    let before = setup.sysdig.queries().len();
    eventually("there are more refreshes", SOON, || setup.sysdig.queries().len() >= before + 6);
    for query in setup.sysdig.queries() {
        assert!(query["filter"].as_str().unwrap().contains("kubernetes.namespace.name = 'default'"), "{query}");
    }
    assert_eq!(setup.kubernetes.counter_of("/pods") - lists, 3, "objects are remembered for longer than a refresh");
}

#[test]
fn in_promql_sixty_objects_are_one_query_for_each_refresh_too() {
    const COUNT: usize = 60;
    if let Some(why) = missing() {
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{why}\n"));
        return;
    }
    let samples: Vec<Samples> = (0..COUNT)
        .flat_map(|index| {
            let labels = format!(
                r#"{{kube_cluster_name="demo",kube_namespace_name="default",kube_pod_name="kuard-{index}",container_name="a"}}"#
            );
            ["queue_depth", "sysdig_container_up"].map(|name| {
                let (series, first) = (format!("{name}{labels}"), index as f64);
                Samples { series, first, step: 0.0, newest: -1200 }
            })
        })
        .collect();
    let prometheus = Prometheus::start(TOKEN, &samples);
    let stage = Stage::new();
    stage.deployment("default", "kuard", COUNT, &[]);
    let setup = stage.start(
        binary(),
        &[("SDC_ENDPOINT", prometheus.url()), ("SDC_BACKEND", "promql".to_owned()), ("REFRESH_INTERVAL", "1s".to_owned())],
    );
    setup.adapter.wait_ready(&setup.client);
    let read = |index: usize| setup.read(&format!("{BASE}/pods/kuard-{index}/queue_depth")).value();
    for _ in 0..2 {
        thread::scope(|scope| {
            for index in 0..COUNT {
                scope.spawn(move || assert_eq!(read(index), index.to_string()));
            }
        });
    }
    let before = prometheus.queries().len();
    eventually("there are more refreshes", SOON, || prometheus.queries().len() >= before + 4);
    for (method, query) in prometheus.queries().into_iter().skip(before + 1) {
        assert_eq!(method, "POST", "it is too long for a path");
        assert!(
            (0..COUNT).all(|index| query.contains(&format!("kuard\\\\-{index}")) || query.contains(&format!("kuard-{index}"))),
            "{query}"
        );
    }
}

#[test]
fn a_reading_that_nobody_asks_for_again_is_not_refreshed() {
    let setup = start(with_metrics(2), &[("REFRESH_INTERVAL", "1s")]);
    assert_eq!(setup.read(&read_of("my.metric.0")).value(), "0");
    warm(&setup, &read_of("my.metric.1"));
    let before = asked_for(&setup, "my.metric.1");
    // The other one is the clock.
    eventually("there are refreshes", SOON, || asked_for(&setup, "my.metric.1") >= before + 4);
    assert_eq!(asked_for(&setup, "my.metric.0"), 1);
    assert_eq!(setup.read(&read_of("my.metric.0")).value(), "0", "asked for after a while, it is asked anew");
    assert_eq!(asked_for(&setup, "my.metric.0"), 2);
}

#[test]
fn while_sysdig_fails_the_last_good_value_is_served_with_its_time_until_it_is_too_old() {
    let table = [
        (Fault::Status(500), "backend-error"),
        (Fault::Reset, "backend-unreachable"),
        (Fault::Hang, "backend-timeout"),
        (Fault::Truncated, "backend-invalid-answer"),
        (Fault::Garbage, "backend-invalid-answer"),
        (Fault::StatusWithRetryAfter(429, 1), "backend-rate-limited"),
    ];
    thread::scope(|scope| {
        for (fault, word) in table {
            scope.spawn(move || outage(&fault, word));
        }
    });
}

fn outage(fault: &Fault, word: &str) {
    let settings = [("REFRESH_INTERVAL", "1s"), ("MAX_AGE", "60s"), ("SDC_TIMEOUT", "1s")];
    let setup = start(Stage::new(), &settings);
    // Values that are nearly too old already, so that nobody has to wait for it.
    setup.sysdig.fail(Fault::Stale(30));
    warm(&setup, READ);
    setup.sysdig.fail(fault.clone());
    setup.adapter.wait_log(&format!(" Sysdig: {word}: "));
    let last = setup.read(READ);
    setup.sysdig.world().set("default", "kuard", METRIC, 99.0);
    let mut served = 0;
    let mut connection = setup.client.connect();
    let refused = poll(Duration::from_secs(60), || {
        let response = connection.get_as(HPA, &HPA_GROUPS, READ);
        if response.status != 200 {
            return Some(response);
        }
        assert_eq!((response.value(), stamp(&response)), ("50".to_owned(), stamp(&last)), "{fault:?}");
        served += 1;
        poll(Duration::from_millis(100), || None::<()>);
        None
    });
    let refused = refused.unwrap_or_else(|| panic!("{fault:?}: the value never gets too old"));
    assert!(served > 1, "{fault:?}");
    let (found, message) = refusal(&refused);
    assert_eq!((refused.status, found.as_str()), (503, word), "{message}");
    let (_, since) = message.split_once(" (since 20").unwrap_or_else(|| panic!("{fault:?}: {message}"));
    let (_, age) = since.split_once("the last value is ").unwrap_or_else(|| panic!("{fault:?}: {message}"));
    let age: u64 = age.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap();
    assert!((61..120).contains(&age), "{fault:?}: {message}");
    setup.sysdig.heal();
    eventually("it recovers", SOON, || setup.read(READ).status == 200);
    assert_eq!(setup.read(READ).value(), "99", "{fault:?}");
    setup.adapter.wait_log("Sysdig: works again");
    let log = setup.adapter.log();
    assert_eq!(log.lines().filter(|line| line.contains(&format!(" Sysdig: {word}: "))).count(), 1, "{log}");
}

#[test]
fn after_an_outage_a_reading_is_fresh_within_some_intervals_however_long_it_was() {
    let setup = start(Stage::new(), &[("REFRESH_INTERVAL", "2s")]);
    warm(&setup, READ);
    setup.sysdig.fail(Fault::Status(500));
    let before = setup.sysdig.request_count();
    eventually("it failed for a while", Duration::from_secs(60), || setup.sysdig.request_count() >= before + 5);
    setup.sysdig.world().set("default", "kuard", METRIC, 70.0);
    setup.sysdig.heal();
    // Sysdig is tried again after three intervals and a quarter of them at most.
    eventually("the reading is fresh", Duration::from_secs(12), || {
        let response = setup.read(READ);
        response.status == 200 && response.value() == "70"
    });
}

#[test]
fn neither_a_hanging_sysdig_nor_a_burst_of_cold_asks_delays_what_is_known() {
    let stage = with_metrics(200);
    let setup = start(stage, &[("REFRESH_INTERVAL", "1m"), ("SDC_TIMEOUT", "30s")]);
    warm(&setup, READ);
    setup.sysdig.fail(Fault::Hold);
    thread::scope(|scope| {
        for index in 0..200 {
            let setup = &setup;
            scope.spawn(move || setup.read(&read_of(&format!("my.metric.{index}"))));
        }
        eventually("as many queries as may be are under way", SOON, || setup.sysdig.held() == 4);
        let mut kept = setup.client.connect();
        for _ in 0..50 {
            assert_eq!(kept.get_as(HPA, &HPA_GROUPS, READ).value(), "50");
            assert_eq!(setup.read(READ).value(), "50", "over a new connection");
            for path in ["/healthz", "/readyz", "/version"] {
                assert_eq!(setup.client.get(path).status, 200, "{path}");
            }
            for path in ["/apis", "/apis/custom.metrics.k8s.io/v1beta1"] {
                // As the aggregator asks, whose right to it is no question.
                assert_eq!(kept.get_as("system:aggregator", &["system:masters"], path).status, 200, "{path}");
            }
        }
        for path in ["/apis", "/apis/custom.metrics.k8s.io/v1beta1", READ] {
            // Someone of whom nothing is remembered waits for the Kubernetes API only.
            let groups = [HPA_GROUPS[0], "some:group", path];
            assert_eq!(kept.get_as(HPA, &groups, path).status, 200, "{path}");
        }
        assert_eq!(setup.sysdig.held(), 4, "Sysdig has not answered yet");
        setup.sysdig.heal();
    });
}

#[test]
fn a_cold_ask_is_told_after_five_seconds_that_its_query_goes_on_and_the_next_one_has_it() {
    let setup = start(Stage::new(), &[("REFRESH_INTERVAL", "1m"), ("SDC_TIMEOUT", "30s")]);
    setup.sysdig.fail(Fault::Hold);
    let response = setup.read(READ);
    let (word, message) = refusal(&response);
    assert_eq!((response.status, word.as_str()), (503, "backend-timeout"));
    assert!(message.contains("the query goes on: ask again"), "{message}");
    assert_eq!(setup.sysdig.held(), 1);
    setup.sysdig.heal();
    assert_eq!(setup.read(READ).value(), "50");
    assert_eq!(setup.sysdig.queries().len(), 1);
}

#[test]
fn over_capacity_is_429_at_once_and_says_when_to_ask_again() {
    let mut command = Command::new("sh");
    command.arg("-c").arg("ulimit -n 4096; exec \"$0\"").arg(binary().get_program());
    let overrides = [("REFRESH_INTERVAL", "1m".to_owned()), ("SDC_TIMEOUT", "30s".to_owned())];
    let setup = Stage::new().start(command, &overrides);
    setup.adapter.wait_ready(&setup.client);
    setup.sysdig.fail(Fault::Hold);
    let (done, (answers, answered)) = (AtomicBool::new(false), mpsc::channel());
    thread::scope(|scope| {
        // More than there are places: 32 that wait for Sysdig, and 256 that wait for those.
        for _ in 0..340 {
            let (setup, done, answers) = (&setup, &done, answers.clone());
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let response = setup.read(READ);
                    if response.status == 429 {
                        let _ = answers.send(response);
                        return;
                    }
                }
            });
        }
        let response = answered.recv_timeout(Duration::from_secs(60)).expect("somebody is over capacity");
        assert!(setup.sysdig.held() >= 1, "Sysdig has not answered yet");
        assert_eq!(setup.client.get("/healthz").status, 200);
        done.store(true, Ordering::Relaxed);
        setup.sysdig.heal();
        assert_eq!(response.header("retry-after"), Some("1"));
        assert_eq!(refusal(&response).0, "overloaded");
    });
    assert_eq!(setup.read(READ).value(), "50");
}

#[test]
fn a_limit_of_the_rate_stops_all_queries_for_as_long_as_it_says() {
    let settings = [("REFRESH_INTERVAL", "1s"), ("SDC_MAX_CONCURRENT", "1")];
    let setup = start(with_metrics(3), &settings);
    for metric in ["my.metric.0", "my.metric.1"] {
        warm(&setup, &read_of(metric));
    }
    let count = || setup.sysdig.request_count();
    setup.sysdig.fail(Fault::StatusWithRetryAfter(429, 4));
    setup.adapter.wait_log(" Sysdig: backend-rate-limited: ");
    for _ in 0..2 {
        // The moment before the query that is refused, and that at which there is another.
        let (before, mut last) = (count(), Instant::now());
        let next = poll(SOON, || {
            let seen = last;
            last = Instant::now();
            (count() > before).then_some(seen)
        });
        let refused = next.expect("Sysdig is tried again");
        // Who asks meanwhile is told at once, and nothing is asked for them.
        let at = count();
        let response = setup.read(&read_of("my.metric.2"));
        let (word, message) = refusal(&response);
        assert_eq!((response.status, word.as_str()), (503, "backend-rate-limited"), "{message}");
        assert!(message.contains("it is asked again in "), "{message}");
        assert_eq!(response.header("retry-after"), None, "client-go would sleep and ask again");
        assert!(response.json()["details"]["retryAfterSeconds"].as_u64().is_some_and(|it| (1..=6).contains(&it)));
        let again = poll(SOON, || (count() > at).then(Instant::now)).expect("Sysdig is tried again");
        assert!(again - refused >= Duration::from_secs(4), "{:?}", again - refused);
    }
    setup.sysdig.heal();
    eventually("all is well again", SOON, || setup.read(&read_of("my.metric.2")).status == 200);
}

#[test]
fn the_budget_of_queries_is_never_exceeded() {
    let setup = start(with_metrics(30), &[("REFRESH_INTERVAL", "1s"), ("SDC_MAX_QUERIES_PER_MINUTE", "10")]);
    // What the catalogue took may be of a minute before.
    let (before, since) = (setup.sysdig.request_count(), unix_now() / 60);
    let answers = thread::scope(|scope| {
        let asking: Vec<_> = (0..30)
            .map(|index| {
                let setup = &setup;
                scope.spawn(move || setup.read(&read_of(&format!("my.metric.{index}"))).status)
            })
            .collect();
        asking.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<u16>>()
    });
    assert!(answers.contains(&200) && answers.contains(&503), "{answers:?}");
    let (spent, minutes) = (setup.sysdig.request_count() - before, unix_now() / 60 - since + 1);
    assert!(spent <= 10 * minutes.cast_unsigned(), "{spent} queries in {minutes} minutes");
}

#[test]
fn a_clock_of_sysdig_that_is_off_is_one_line_of_log() {
    let stage = Stage::new();
    stage.sysdig.world().clock_offset = 600;
    let setup = start(stage, &[("REFRESH_INTERVAL", "1s")]);
    warm(&setup, READ);
    let before = setup.sysdig.queries().len();
    eventually("there are refreshes", SOON, || setup.sysdig.queries().len() >= before + 3);
    let lines = |text: &str| setup.adapter.log().lines().filter(|line| line.contains(text)).count();
    assert_eq!(lines("Sysdig's clock is "), 1, "{}", setup.adapter.log());
    assert_eq!(setup.read(READ).value(), "50", "its values count all the same");
    setup.sysdig.world().clock_offset = 0;
    setup.adapter.wait_log("clock: works again");
    assert_eq!(lines("Sysdig's clock is "), 1, "{}", setup.adapter.log());
}
