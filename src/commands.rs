//! What the program does besides serving: `explain` and `check` of HorizontalPodAutoscalers, and `doctor`.
//! They take the server's own steps, so what they say is what it does; only they print. See docs/commands.md.

use crate::prelude::*;
use crate::{certs::trusted, kube, promql, readings::Readings, route::percent_decode, route::route};
use crate::{run::variable, run::visible, store::Ask, store::Plan};
use std::io::{Read, Write, stderr, stdin, stdout};
use std::{fs, mem, path::PathBuf, process::ExitCode, slice};

const MOST_INPUT: u64 = 16 * 1024 * 1024;
/// Of objects and values.
const MOST_SHOWN: usize = 10;
const HPA: [&str; 2] = ["HorizontalPodAutoscaler", "autoscaling/v2"];
const ROLES: &str = "kubectl apply -f manifests/01-sysdig-metrics-rbac.yml";
const CONTROLLER: &str = "system:serviceaccount:kube-system:horizontal-pod-autoscaler";
const REVIEWS: &str = "authorization.k8s.io";
const PODS: &str = "kubectl get pods,endpointslices -n custom-metrics";
const CLUSTER: &str = "kubectl set env deployment/custom-metrics-apiserver -n custom-metrics CLUSTER_NAME=NAME";
const LOG: &str = "kubectl logs -n custom-metrics deployment/custom-metrics-apiserver";
const AGENT: &str = "kubectl get pods -A -o wide, for the Sysdig agent";
const ASSUMED: &str = "status.currentReplicas, or else minReplicas, stands for the ready pods, all of which count";

/// Whether all is well. Errors: arguments, settings or input are wrong, and how.
type Done = Result<bool, String>;
type Tools = (Config, Readings);
/// A metric source: its HPA, its type, and what stands under that.
type Source<'a> = (&'a Value, &'a str, &'a Value);

/// Runs a command. 0 means that all is well, 1 that something is not, 2 that it was called wrongly.
pub fn run(arguments: &[String]) -> ExitCode {
    let done = match *arguments.iter().map(String::as_str).collect::<Vec<_>>() {
        ["--help"] => Ok(include_str!("help.txt").lines().all(say)),
        ["--version"] => Ok(say(concat!("sysdig-metrics-adapter ", env!("CARGO_PKG_VERSION")))),
        ["explain", which] => explain(which),
        ["doctor"] | ["doctor", "--json"] => doctor(arguments.len() > 1),
        ["check"] => check(None),
        ["check", "--config", file] => check(Some(file)),
        _ => Err(format!("{} is no command: see sysdig-metrics-adapter --help", quoted(&arguments.join(" ")))),
    };
    let well = done.map_err(|mistake| writeln!(stderr(), "{mistake}"));
    ExitCode::from(well.map_or(2, |well| u8::from(!well)))
}

/// A line for the reader, if there still is one: a closed pipe changes nothing.
fn say(line: &str) -> bool {
    let _ = writeln!(stdout(), "{}", line.chars().map(visible).collect::<String>());
    true
}

fn row(what: &str, text: &str) {
    say(&format!("    {what:<15} {text}"));
}

fn tools() -> Result<Tools, String> {
    let config = Config::read(variable).map_err(|mistakes| mistakes.join("\n"))?;
    let (kube, sysdig) = (Arc::new(Kube::new(&config)), Arc::new(Sysdig::new(&config)?));
    Ok((config.clone(), Readings::new(&config, kube, sysdig, Arc::default())))
}

/// Takes over definitions, of `CONFIG_FILE` if no other file is given. Errors: they cannot be used.
fn define((config, readings): &Tools, file: Option<&str>) -> Result<String, String> {
    let file = file.map(PathBuf::from).or_else(|| config.definitions.clone());
    let Some(file) = file else { return Ok("not set".to_owned()) };
    let loaded = readings.definitions.load(fs::read(&file).map_err(|error| error.to_string()));
    loaded.map(|hash| format!("hash {hash}")).map_err(|mistake| format!("{}: {mistake}", file.display()))
}

fn text<'a>(of: &'a Value, pointer: &str) -> &'a str {
    of.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// Where it says none, `kubectl apply` would take this one.
fn namespace(hpa: &Value) -> &str {
    Some(text(hpa, "/metadata/namespace")).filter(|it| !it.is_empty()).unwrap_or("default")
}

/// The HPAs on stdin, one or a List. Errors: it is something else.
fn autoscalers() -> Result<Vec<Value>, String> {
    let no = |mistake: String| format!("stdin {mistake}: give what kubectl get hpa -A -o json prints");
    let mut bytes = Vec::new();
    let length = stdin().take(MOST_INPUT).read_to_end(&mut bytes).map_err(|error| no(error.to_string()))?;
    let found = if length as u64 == MOST_INPUT { Err(no("is longer than 16 MiB".to_owned())) } else { Ok(&bytes) };
    let mut found: Value = serde_json::from_slice(found?).map_err(|error| no(format!("is not JSON ({error})")))?;
    let items = found.get_mut("items").and_then(Value::as_array_mut).map(mem::take);
    let all = if found["kind"] == "List" { items.unwrap_or_default() } else { vec![found] };
    let odd = all.iter().find(|it| ["kind", "apiVersion"].map(|key| it[key].as_str()) != HPA.map(Some));
    let odd = odd.map(|odd| no(format!("holds {}, which is no HPA of {}", quoted(&odd.to_string()), HPA[1])));
    odd.map_or(Ok(all), Err)
}

/// The metric sources of an HPA, with their names.
fn sources(hpa: &Value) -> impl Iterator<Item = (String, Source<'_>)> {
    let name = format!("{}/{}", namespace(hpa), text(hpa, "/metadata/name"));
    items(hpa, "/spec/metrics").zip(1..).map(move |(it, number)| {
        let (kind, spec) = (text(it, "/type"), &it[text(it, "/type").to_ascii_lowercase()]);
        (format!("{name} metric {number} {}", text(spec, "/metric/name")), (hpa, kind, spec))
    })
}

/// Why another server answers it, if one does.
fn foreign(kind: &str, config: &Config) -> Option<&'static str> {
    let here = kind != "External" || config.external;
    if kind.ends_with("Resource") { Some("is metrics-server's") } else { (!here).then_some("EXTERNAL_METRICS is off") }
}

/// A LabelSelector as it stands in a path.
fn selector(of: &Value) -> String {
    let labels = of["matchLabels"].as_object().into_iter().flatten();
    let labels = labels.map(|(key, value)| format!("{key}={}", text(value, "")));
    let expressions = items(of, "/matchExpressions").map(|it| {
        let values = items(it, "/values").map(|it| text(it, "")).collect::<Vec<_>>().join(",");
        match (text(it, "/key"), text(it, "/operator")) {
            (key, "Exists") => key.to_owned(),
            (key, "DoesNotExist") => format!("!{key}"),
            (key, operator) => format!("{key} {} ({values})", operator.to_ascii_lowercase()),
        }
    });
    percent_encode(labels.chain(expressions).collect::<Vec<_>>().join(","))
}

fn resource(reference: &Value, (_, readings): &Tools) -> Result<&'static Resource> {
    let (kind, version) = (text(reference, "/kind"), text(reference, "/apiVersion"));
    let group = version.rsplit_once('/').map_or("", |(group, _)| group);
    let mut all = Resource::all().chain(readings.definitions.in_force().1);
    let found = all.find(|it| (it.kind, it.group()) == (kind, group));
    found.ok_or_else(|| refusal!(NotFound, "{} of apiVersion {} has no metrics here", quoted(kind), quoted(version)))
}

/// The selector of the pods that an HPA scales.
fn pods(tools: &Tools, hpa: &Value) -> Result<String> {
    let (reference, kube) = (&hpa["spec"]["scaleTargetRef"], &tools.1.kube);
    let unknown =
        |_| refusal!(NotFound, "the server serves it, but explain does not know which pods {reference} selects");
    let (of, [place, name]) =
        (resource(reference, tools).map_err(unknown)?, [namespace(hpa), text(reference, "/name")]);
    let query = format!("?fieldSelector=metadata.name%3D{}", percent_encode(name));
    let list = kube.call(Method::GET, &kube::path(of, &percent_encode(place), &query), JSON, None, of.plural)?;
    let found = items(&list, "/items").map(|it| selector(&it["spec"]["selector"])).find(|it| !it.is_empty());
    found.ok_or_else(|| refusal!(ObjectNotFound, "{} does not exist, or selects no pods", named(of, place, name)))
}

/// The path that the HPA controller asks for; `pods` selects what a Pods metric is of.
/// Source: <https://github.com/kubernetes/kubernetes/blob/master/pkg/controller/podautoscaler/metrics/client.go>.
fn request(tools: &Tools, (hpa, kind, spec): Source<'_>, pods: &str) -> Result<String> {
    let (metric, object) = (text(spec, "/metric/name"), text(spec, "/describedObject/name"));
    let [place, metric, object] = [namespace(hpa), metric, object].map(percent_encode);
    let base = format!("/apis/{GROUP}/v1beta2/namespaces/{place}");
    let described = |of: &Resource| match *of {
        // The controller does not look at its name.
        Resource::NAMESPACES => format!("{base}/metrics/{metric}"),
        _ => format!("{base}/{}/{object}/{metric}", of.qualified()),
    };
    let external = format!("/apis/{EXTERNAL}/v1beta1/namespaces/{place}/{metric}");
    let (path, key) = match kind {
        "Object" => (described(resource(&spec["describedObject"], tools)?), "?metricLabelSelector"),
        "Pods" => (format!("{base}/pods/%2A/{metric}?labelSelector={pods}"), "&metricLabelSelector"),
        "External" => (external, "?labelSelector"),
        _ => return Err(refusal!(InvalidRequest, "{} is no type of metric", quoted(kind))),
    };
    let missing = metric.is_empty() || (kind == "Object" && object.is_empty());
    ensure!(!missing, InvalidRequest, "{kind} without metric.name, or without describedObject.name");
    let labels = selector(&spec["metric"]["selector"]);
    Ok(if labels.is_empty() { path } else { format!("{path}{key}={labels}") })
}

/// What the server makes of a path. Errors: it refuses.
fn plan((config, readings): &Tools, path: &str) -> Result<Plan> {
    let plan = match route("GET", path, config.external, readings.definitions.in_force().1)? {
        Route::Read(read) => readings.plan(&read)?,
        _ => return Err(refusal!(NotFound, "{} is no metric", quoted(path))),
    };
    let promql = readings.sysdig.speaks_promql(&plan.question.metric);
    if promql { promql::query(&plan.question, &Scope::default(), "", 0).map(|_| plan) } else { Ok(plan) }
}

/// A quantity in thousandths, rounded up: the controller computes with those.
fn thousandths(quantity: &str) -> Option<f64> {
    let (digits, suffix) = quantity.split_at(quantity.find(char::is_alphabetic).unwrap_or(quantity.len()));
    let binary = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"].iter().position(|it| *it == suffix);
    let decimal = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"].iter().position(|it| *it == suffix);
    let exponent = || suffix.strip_prefix(['e', 'E'])?.parse::<i32>().ok();
    let power = decimal.map(|at| 3 * at as i32 - 9).or_else(|| binary.map(|_| 0)).or_else(exponent)?.saturating_add(3);
    let number: f64 = format!("{digits}e{power}").parse().ok()?;
    Some((number * 1024_f64.powi(binary.unwrap_or_default() as i32)).ceil()).filter(|it| it.is_finite())
}

/// The type of a target and its thousandths. Errors: it does not fit.
fn target<'a>((_, kind, spec): Source<'a>) -> Result<(&'a str, f64)> {
    let (of, takes) =
        (text(spec, "/target/type"), if kind == "Pods" { "AverageValue" } else { "Value or AverageValue" });
    let fits = !of.is_empty() && takes.split(" or ").any(|it| it == of);
    ensure!(fits, InvalidRequest, "target.type is {}, and {kind} takes {takes}", quoted(of));
    let given = &spec["target"][if of == "Value" { "value" } else { "averageValue" }];
    let given = given.as_str().map_or_else(|| given.to_string(), str::to_owned);
    let found = thousandths(&given).filter(|it| *it > 0.0).map(|it| (of, it));
    found.ok_or_else(|| refusal!(InvalidRequest, "the target is {}: it must be a quantity above 0", quoted(&given)))
}

fn explain(which: &str) -> Done {
    let (tools, mut well) = (tools()?, true);
    define(&tools, None)?;
    let names = which.split_once('/').map(|names| <[_; 2]>::from(names).map(percent_encode));
    let hpas = match names {
        Some([namespace, name]) if !(namespace.is_empty() || name.is_empty()) => {
            let path = format!("/apis/{}/namespaces/{namespace}/horizontalpodautoscalers/{name}", HPA[1]);
            let found = tools.1.kube.call(Method::GET, &path, JSON, None, &format!("HPA {which}"));
            let refused = |error: Error| well = !say(&format!("{which}: {}", error.line()));
            found.map_err(refused).into_iter().collect()
        }
        _ if which == "-" => autoscalers()?,
        _ => return Err(format!("{} is neither NAMESPACE/HPA nor -", quoted(which))),
    };
    // What the log holds of Sysdig at level debug.
    let mut log = env_logger::Builder::new();
    log.filter_module("sysdig_metrics_adapter::sysdig", log::LevelFilter::Debug).target(env_logger::Target::Stdout);
    log.format(|out, record| {
        let line = record.args().to_string();
        let (what, text) = line.split_once(": ").unwrap_or(("", &line));
        let readable = percent_decode(text, false).filter(|_| what.ends_with("asked"));
        let text: String = readable.as_deref().unwrap_or(text).chars().map(visible).collect();
        writeln!(out, "    {what:<15} {text}")
    });
    log.init();
    for (name, source) in hpas.iter().flat_map(sources) {
        say(&format!("{name} ({})", source.1));
        if let Err(error) = explain_one(&tools, source) {
            row("refused", &error.line());
            well = false;
        }
    }
    let _ = !well || hpas.iter().any(|it| sources(it).next().is_some()) || say("there are no metrics to explain");
    Ok(well)
}

fn explain_one(tools: &Tools, source: Source<'_>) -> Result<()> {
    let ((config, readings), (hpa, kind, _)) = (tools, source);
    if let Some(why) = foreign(kind, config) {
        row("not ours", why);
        return Ok(());
    }
    let path = request(tools, source, &if kind == "Pods" { pods(tools, hpa)? } else { String::new() })?;
    row("path", &path);
    let (plan, target, now) = (plan(tools, &path)?, target(source)?, unix_now());
    readings.sysdig.check_configured()?;
    let Plan { question, select, .. } = &plan;
    let objects = readings.objects(select, question.resource, false)?;
    let names: Vec<_> = objects.iter().take(MOST_SHOWN).map(|(_, name)| name.as_str()).collect();
    row("objects", &format!("{} {}: {}", objects.len(), question.resource.plural, names.join(", ")));
    let found: Result<Vec<_>> = readings.fetch(question, slice::from_ref(select), now)?.into_iter().collect();
    let mut ask = Ask::default();
    ask.take(found.map(|found| found.concat()), true, Instant::now(), now);
    let found = ask.outcome(&plan, config.max_age.as_secs(), now)?;
    for (name, value, end) in found.iter().take(MOST_SHOWN) {
        let (window, age, end) = (question.tuning.window, now.saturating_sub(*end), rfc3339(*end));
        row("value", &format!("{value} for {name} ({window} s to {end}, {age} s ago)"));
    }
    let values: Vec<_> = found.iter().filter_map(|(_, value, _)| thousandths(&value.to_string())).collect();
    row("replicas", &replicas(hpa, kind, target, &values));
    Ok(())
}

/// What the controller makes of the values, and how. What it knows of single pods is not known here.
/// Source: <https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details>.
fn replicas(hpa: &Value, kind: &str, (of, target): (&str, f64), values: &[f64]) -> String {
    let number = |pointer: &str| hpa.pointer(pointer).and_then(Value::as_u64).map(|it| it as f64);
    let (least, total) = (number("/spec/minReplicas").unwrap_or(1.0), values.iter().sum::<f64>());
    let now = number("/status/currentReplicas").unwrap_or(least);
    // None at all count as one.
    let (pods, each) = if of == "Value" { (now.max(1.0), 1.0) } else { (1.0, now) };
    let (count, mut total) = (values.len() as f64, total);
    if kind == "Pods" {
        if count != now {
            return format!("not known here: {count} of {now} pods have a value, and what the others count as depends");
        }
        // The controller computes with whole thousandths of the mean.
        total = (total / count).floor() * count;
    }
    let steady = now > 0.0 && (total / (target * each) - 1.0).abs() <= 0.1;
    let wanted = if steady { now } else { (total / target * pods).ceil() };
    let result = wanted.min(number("/spec/maxReplicas").unwrap_or(f64::MAX)).max(least);
    let factor = if of == "Value" { format!("{pods} pods × ") } else { String::new() };
    let why = if steady { "as now: within the tolerance of 0.1" } else { "rounded up" };
    let (total, target) = (total / 1000.0, target / 1000.0);
    format!("{result}: {factor}{total} ÷ {target} = {wanted} ({why}), then minReplicas and maxReplicas; {ASSUMED}")
}

fn check(config_file: Option<&str>) -> Done {
    let (tools, mut counts) = (tools()?, (0, 0));
    define(&tools, config_file)?;
    let hpas = autoscalers()?;
    for (name, source) in hpas.iter().flat_map(sources).filter(|(_, it)| foreign(it.1, &tools.0).is_none()) {
        let found = findings(&tools, source);
        counts = (counts.0 + 1, counts.1 + found.len());
        found.iter().all(|error| say(&format!("{name}: {}", error.line())));
    }
    say(&format!("HPAs: {}, metrics of the adapter: {}, findings: {}", hpas.len(), counts.0, counts.1));
    Ok(counts.1 == 0)
}

/// What is wrong with a metric whatever its value is.
fn findings(tools: &Tools, source: Source<'_>) -> Vec<Error> {
    let ((hpa, kind, spec), target) = (source, target(source).map(|_| ()));
    let planned = request(tools, source, "a").and_then(|path| plan(tools, &path));
    let mistakes = planned.as_ref().err().into_iter().chain(target.as_ref().err()).cloned();
    let rules = planned.as_ref().ok().into_iter().flat_map(|Plan { question, select, .. }| {
        let (of, tuning, reference) = (text(spec, "/target/type"), &question.tuning, &hpa["spec"]["scaleTargetRef"]);
        // A Service of that name is taken to stand before it.
        let same = [text(reference, "/kind"), "Service"].contains(&select.resource.kind);
        let own = kind == "Pods" || (same && select.name == text(reference, "/name"));
        let raw = !tools.1.sysdig.speaks_promql(&question.metric) && tuning.time != "timeAvg";
        let counter = promql::series(question).is_ok_and(|(_, kind)| kind == "counter");
        let divided = !["", "sum"].contains(&tuning.group);
        let rules = [
            of == "Value" && tuning.group == "sum",
            kind == "Object" && of == "AverageValue" && divided && select.resource.counts_pods(),
            raw && counter,
            own && hpa["spec"]["minReplicas"] == 0,
        ];
        rules.into_iter().zip(include_str!("findings.txt").lines()).filter(|it| it.0)
    });
    mistakes.chain(rules.map(|(_, why)| Error::new(Reason::InvalidRequest, why))).collect()
}

fn doctor(as_json: bool) -> Done {
    let tools = tools()?;
    let (config, Readings { kube, sysdig, definitions, .. }) = &tools;
    let (now, mut rows, ok) = (unix_now(), Vec::new(), |text: &str| text.to_owned());
    let mut check = |name: &str, found: Result<String>| {
        let mild = name == "clock" || found.as_ref().is_err_and(|it| it.message.contains("doctor-rbac"));
        let word = found.as_ref().map_or_else(|it| it.reason.word(), |_| "");
        let status = if word.is_empty() { "ok" } else { ["fail", "warn"][usize::from(mild)] };
        let message = found.unwrap_or_else(|it| it.line());
        let _ = as_json || say(&format!("{status:<4}  {name:<41}  {message}"));
        rows.push(json!({ "check": name, "status": status, "word": word, "message": message }));
    };
    check("settings", sysdig.check_configured().map(|()| ok("token and CLUSTER_NAME are there")));
    check("CONFIG_FILE", define(&tools, None).map_err(|mistake| refusal!(NotConfigured, "{mistake}")));
    for ((group, version), served) in APIS.into_iter().zip([true, true, config.external]) {
        let (name, path) = (format!("{version}.{group}"), format!("/apis/{group}/{version}"));
        let slot = slot(config, kube, &name, served);
        check(&format!("slot {name}"), slot.as_ref().map(|(owner, _)| owner.clone()).map_err(Error::clone));
        if let (Ok((_, api)), true) = (slot, served) {
            let state = items(&api, "/status/conditions").find(|it| it["type"] == "Available");
            let state = quoted(state.map_or("nothing", |it| text(it, "/message")));
            let trusted = trusted(config, kube, text(&api, "/spec/caBundle"), now).map(|()| ok("verifies the adapter"));
            let no = |why| refusal!(ForeignSlot, "it does not verify the certificate that is served ({why}): {LOG}");
            check(&format!("caBundle {name}"), trusted.map_err(no));
            let found = kube.call(Method::GET, &path, JSON, None, &path).map(|_| ok("reaches the adapter"));
            let why = |it: Error| Error::new(it.reason, format!("{} (APIService: {state}): {PODS}", it.message));
            check(&format!("aggregator {name}"), found.map_err(why));
        }
    }
    check("front proxy", kube.request_header().map(|_| ok("its CA and headers are known")));
    let reviews = [["create", "authentication.k8s.io", "tokenreviews"], ["create", REVIEWS, "subjectaccessreviews"]];
    let all = Resource::all().chain([&Resource::ENDPOINT_SLICES]).chain(definitions.in_force().1);
    let lists = all.map(|it| ["list", it.group(), it.plural]);
    check("own permissions", allowed(kube, None, lists.chain(reviews)));
    let reads = [["get", GROUP, "*"], ["list", EXTERNAL, "*"]].into_iter().take(1 + usize::from(config.external));
    check("HPA controller", allowed(kube, Some(CONTROLLER), reads));
    let token = sysdig.catalogue().map(|it| format!("reads the names of {} metrics", it.len()));
    check("Sysdig token", token.clone());
    let clock = token.and_then(|_| sysdig.check_clock());
    check("clock", clock.map(|()| format!("Sysdig's is {} s ahead", sysdig.skew.load(Relaxed))));
    for (name, span, why) in [("cluster name", 86_400, CLUSTER), ("agent", 120, AGENT)] {
        let seen = sysdig.sees_cluster(now, span);
        let none = || refusal!(NoData, "Sysdig has no sample of this cluster in the last {span} s: {why}");
        check(name, seen.and_then(|it| it.then(|| format!("seen in the last {span} s")).ok_or_else(none)));
    }
    let _ = as_json && say(&json!(rows).to_string());
    Ok(rows.iter().all(|it| it["status"] != "fail"))
}

/// Who owns an API, and its APIService. Errors: it is not ours though we serve it, or the other way round.
fn slot(config: &Config, kube: &Kube, name: &str, served: bool) -> Result<(String, Value)> {
    let path = format!("/apis/apiregistration.k8s.io/v1/apiservices/{name}");
    let api = match kube.call(Method::GET, &path, JSON, None, &format!("APIService {name} ({ROLES})")) {
        Err(error) if !served && error.reason == Reason::ObjectNotFound => {
            return Ok(("nobody's".to_owned(), json!({})));
        }
        found => found?,
    };
    let own = format!("Service {}/{}", kube.own_namespace(), config.service_name);
    let owner = format!("Service {}/{}", text(&api, "/spec/service/namespace"), text(&api, "/spec/service/name"));
    ensure!(!served || owner == own, ForeignSlot, "it is that of {owner}: see docs/migrating.md, then {ROLES}");
    ensure!(served || owner != own, ForeignSlot, "EXTERNAL_METRICS is off: kubectl delete apiservice {name}");
    Ok((owner, api))
}

/// Whether we, or `user`, may do all of it: verb, group and resource. Errors: what may not be done.
fn allowed<'a>(kube: &Kube, user: Option<&str>, all: impl Iterator<Item = [&'a str; 3]>) -> Result<String> {
    let kind = if user.is_some() { "SubjectAccessReview" } else { "SelfSubjectAccessReview" };
    let (path, mut denied) = (format!("/apis/{REVIEWS}/v1/{}s", kind.to_ascii_lowercase()), Vec::new());
    for [verb, group, resource] in all {
        let what = json!({ "verb": verb, "group": group, "resource": resource });
        let spec = json!({ "resourceAttributes": what, "user": user });
        let review = json!({ "apiVersion": format!("{REVIEWS}/v1"), "kind": kind, "spec": spec });
        let allowed = kube.call(Method::POST, &path, JSON, Some(&review), kind)?["status"]["allowed"] == true;
        denied.extend((!allowed).then(|| format!("{verb} {resource}")));
    }
    ensure!(denied.is_empty(), KubernetesForbidden, "there is no permission to {}: {ROLES}", denied.join(", "));
    Ok("suffices".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_in_every_form_of_kubernetes() {
        let table = [
            ("4", Some(4000.0)),
            ("1.1", Some(1100.0)),
            ("6750m", Some(6750.0)),
            ("400u", Some(1.0)),
            ("1n", Some(1.0)),
            ("2k", Some(2e6)),
            ("1E", Some(1e21)),
            ("1e3", Some(1e6)),
            ("1E-2", Some(10.0)),
            ("1Ki", Some(1_024_000.0)),
            ("1.5Mi", Some(1_572_864_000.0)),
            ("-3", Some(-3000.0)),
            ("9223372036854775807m", Some(9_223_372_036_854_775_807.0)),
            ("", None),
            ("m", None),
            ("4 ", None),
            ("4K", None),
            ("4ki", None),
            ("nan", None),
            ("inf", None),
            ("1e", None),
            ("1e400", None),
            ("1e2147483647", None),
            ("1e-2147483648", Some(0.0)),
            ("0x10", None),
            ("é", None),
            ("4é", None),
            ("1,5", None),
        ];
        for (text, expected) in table {
            assert_eq!(thousandths(text), expected, "{text}");
        }
    }

    #[test]
    fn a_selector_is_written_as_the_controller_writes_it() {
        let of = json!({
            "matchLabels": { "app": "web", "tier": "a" },
            "matchExpressions": [
                { "key": "x", "operator": "In", "values": ["b", "c"] },
                { "key": "y", "operator": "NotIn", "values": ["d"] },
                { "key": "z", "operator": "Exists" },
                { "key": "w", "operator": "DoesNotExist" },
            ],
        });
        let text = percent_decode(&selector(&of), false).unwrap();
        assert_eq!(text, "app=web,tier=a,x in (b,c),y notin (d),z,!w");
        for odd in [json!(null), json!({}), json!([]), json!({ "matchLabels": [1], "matchExpressions": {} })] {
            assert_eq!(selector(&odd), "", "{odd}");
        }
    }

    #[test]
    fn a_namespace_is_asked_about_by_the_hpas_own() {
        let path = |metric: &Value| {
            let hpa = json!({ "metadata": { "namespace": "shop" }, "spec": { "metrics": [metric] } });
            sources(&hpa)
                .map(|(_, source)| request(&tools().unwrap(), source, "app%3Dweb").unwrap())
                .collect::<String>()
        };
        let object = |described: Value| json!({ "type": "Object", "object": { "metric": { "name": "m" }, "describedObject": described } });
        let base = "/apis/custom.metrics.k8s.io/v1beta2/namespaces/shop";
        let table = [
            (object(json!({ "kind": "Namespace", "apiVersion": "v1", "name": "other" })), format!("{base}/metrics/m")),
            (object(json!({ "kind": "Service", "name": "a" })), format!("{base}/services/a/m")),
            (object(json!({ "kind": "Service", "name": "deployment;a" })), format!("{base}/services/deployment%3Ba/m")),
            (
                json!({ "type": "Pods", "pods": { "metric": { "name": "m", "selector": { "matchLabels": { "a": "b" } } } } }),
                format!("{base}/pods/%2A/m?labelSelector=app%3Dweb&metricLabelSelector=a%3Db"),
            ),
        ];
        for (metric, expected) in table {
            assert_eq!(path(&metric), expected);
        }
    }
}
