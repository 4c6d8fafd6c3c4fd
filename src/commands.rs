//! What the program does besides serving: `explain` and `check` of HorizontalPodAutoscalers, and `doctor`.
//! They take the server's own steps, so what they say is what it does; only they print. See docs/commands.md.

use crate::prelude::*;
use crate::{certs, handler::Handler, kube, promql, route::is_name, route::route, run};
use std::io::{BufReader, Read as _, Write, stderr, stdin, stdout};
use std::{fs, path::PathBuf, process::ExitCode};

const REVIEWS: &str = "authorization.k8s.io";
const CONTROLLER: &str = "system:serviceaccount:kube-system:horizontal-pod-autoscaler";

/// Runs a command. 0 means that all is well, 1 that something is not, 2 that it was called wrongly.
pub fn run(arguments: &[String]) -> ExitCode {
    let done = match *arguments.iter().map(String::as_str).collect::<Vec<_>>() {
        ["--help"] => Ok(include_str!("help.txt").lines().all(say)),
        ["--version"] => Ok(say(run::NAME)),
        ["explain", which] => explain(which),
        ["doctor"] | ["doctor", "--json"] => doctor(arguments.len() > 1),
        ["check"] => tools(None).and_then(|handler| Ok(examine(handler, &autoscalers()?, false))),
        ["check", "--config", file] => tools(Some(file)).and_then(|handler| Ok(examine(handler, &autoscalers()?, false))),
        _ => Err(format!("{} is no command: see sysdig-metrics-adapter --help", quoted(&arguments.join(" ")))),
    };
    ExitCode::from(done.map_err(|mistake| writeln!(stderr(), "{mistake}")).map_or(2, |well| u8::from(!well)))
}

/// A line for the reader, if there still is one: a closed pipe changes nothing.
fn say(line: &str) -> bool {
    let _ = writeln!(stdout(), "{}", run::visible(line));
    true
}

/// The server's parts, with the definitions of `file` or else of `CONFIG_FILE`. Errors: settings or definitions are wrong.
fn tools(file: Option<&str>) -> Result<&'static Handler, String> {
    let config = forever(Config::read(run::variable).map_err(|mistakes| mistakes.join("\n"))?);
    let handler = Handler::new(config, Sysdig::new(config)?, 0);
    if let Some(file) = file.map(PathBuf::from).or_else(|| config.definitions.clone()) {
        let loaded = handler.definitions.load(fs::read(&file).map_err(|error| error.to_string()));
        loaded.map_err(|mistake| format!("{}: {mistake}", file.display()))?;
    }
    Ok(handler)
}

/// The HPAs on stdin, one or a List. Errors: it is something else.
fn autoscalers() -> Result<Vec<Value>, String> {
    let no = |mistake: String| format!("stdin {mistake}: give what kubectl get hpa -A -o json prints");
    let found = serde_json::from_reader(BufReader::new(stdin().take(16 * 1024 * 1024)));
    let found: Value = found.map_err(|error| no(format!("is not JSON of up to 16 MiB ({error})")))?;
    let all = if found["kind"] == "List" { items(&found, "/items").cloned().collect() } else { vec![found] };
    let is_hpa = |it: &Value| it["kind"] == "HorizontalPodAutoscaler" && it["apiVersion"] == "autoscaling/v2";
    let odd = all.iter().find(|it| !is_hpa(it)).map(|odd| quoted(&odd.to_string()));
    odd.map_or(Ok(all), |odd| Err(no(format!("holds {odd}, which is no HPA of autoscaling/v2"))))
}

fn explain(which: &str) -> Result<bool, String> {
    let handler = tools(None)?;
    let hpas = match which.split_once('/') {
        Some((namespace, name)) if is_name(namespace, 63) && is_name(name, 253) => {
            let path = format!("/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers/{name}");
            let found = handler.kube.call(Method::GET, &path, JSON, None, &format!("HPA {which}"));
            vec![found.map_err(|error| error.to_string())?]
        }
        _ if which == "-" => autoscalers()?,
        _ => return Err(format!("{} is neither NAMESPACE/HPA nor -", quoted(which))),
    };
    // What the log holds at level debug of objects, and of questions to Sysdig.
    let mut log = env_logger::Builder::new();
    log.parse_filters("sysdig_metrics_adapter::sysdig=debug,sysdig_metrics_adapter::readings=debug");
    log.target(env_logger::Target::Stdout);
    log.format(|out, record| writeln!(out, "    {}", run::visible(&record.args().to_string()))).init();
    thread::spawn(|| iter::repeat_with(|| handler.refresh()).for_each(drop));
    Ok(examine(handler, &hpas, true))
}

/// Looks for mistakes in each metric of the HPAs; with `ask` tells what becomes of it. Whether all is well.
fn examine(handler: &'static Handler, hpas: &[Value], ask: bool) -> bool {
    let (mut metrics, mut findings) = (0, 0);
    for (hpa, (number, it)) in hpas.iter().flat_map(|hpa| iter::repeat(hpa).zip((1..).zip(items(hpa, "/spec/metrics")))) {
        let kind = text(it, "/type");
        let place = Some(text(hpa, "/metadata/namespace")).filter(|it| !it.is_empty()).unwrap_or("default");
        let source = Source { handler, hpa, place, kind, spec: &it[kind.to_ascii_lowercase()] };
        let (name, metric) = (text(hpa, "/metadata/name"), text(source.spec, "/metric/name"));
        let name = format!("{place}/{name} metric {number} {metric} ({kind})");
        let _ = ask && say(&name);
        if kind.ends_with("Resource") || (kind == "External" && !handler.config.external) {
            let _ = ask && say("    not ours: it is metrics-server's, or of type External with EXTERNAL_METRICS off");
            continue;
        }
        let found = source.findings(ask).unwrap_or_else(|error| vec![error]);
        (metrics, findings) = (metrics + 1, findings + found.len());
        found.iter().for_each(|it| _ = say(&if ask { format!("    finding: {it}") } else { format!("{name}: {it}") }));
    }
    say(&format!("HPAs: {}, metrics of the adapter: {metrics}, findings: {findings}", hpas.len()));
    findings == 0
}

/// A metric of an HPA: the namespace, its type, and what stands under that.
struct Source<'a> {
    handler: &'static Handler,
    hpa: &'a Value,
    place: &'a str,
    kind: &'a str,
    spec: &'a Value,
}

impl Source<'_> {
    /// What is wrong with it; with `ask`, what becomes of it is told, too. Errors: it is refused.
    fn findings(&self, ask: bool) -> Result<Vec<Error>> {
        let Self { handler, hpa, kind, .. } = *self;
        let path = self.request(&if ask && kind == "Pods" { self.pods()? } else { "any".to_owned() })?;
        let _ = ask && say(&format!("    path: {path}"));
        let route = route("GET", &path, handler.config.external, &handler.definitions.in_force().resources)?;
        let Route::Read(read) = route else { return Err(refusal!(NotFound, "{} is no metric", quoted(&path))) };
        let ((question, select, defined), (of, target)) = (handler.plan(&read)?, self.target()?);
        let promql = handler.sysdig.speaks_promql(&question.metric);
        promql.then(|| promql::query(&question, &[], 0)).transpose()?;
        if ask {
            let found = handler.read(&read, Duration::from_secs(60), unix_now());
            let (found, window) = found.map_err(|stop| stop.unwrap_or_else(|| refusal!(Internal, "there is no answer")))?;
            for (name, value, end) in found.iter().take(10) {
                let (age, end) = (unix_now().saturating_sub(*end), rfc3339(*end));
                say(&format!("    value: {value} for {name} ({window} s to {end}, {age} s ago)"));
            }
            let values: Vec<_> = found.iter().filter_map(|(_, value, _)| thousandths(&value.to_string())).collect();
            say(&format!("    replicas: {}", self.replicas(of, target, &values)));
        }
        let (group, reference) = (question.tuning.group, &hpa["spec"]["scaleTargetRef"]);
        // Of a template nobody knows, but that a Service is the average of its pods.
        let divided = group != "sum" && (!group.is_empty() || select.resource != question.resource);
        // A Service of that name is taken to stand before it.
        let same = [text(reference, "/kind"), "Service"].contains(&select.resource.kind);
        let counter = promql::series(&question).is_ok_and(|(_, kind)| kind == "counter");
        let step = 10_f64.powi(3 - defined.decimals.unwrap_or(3).min(3).cast_signed());
        let rules = [
            of == "Value" && group == "sum",
            kind == "Object" && of == "AverageValue" && divided && select.resource.counts_pods(),
            counter && !promql && question.tuning.time != "timeAvg",
            (kind == "Pods" || (same && select.name == text(reference, "/name"))) && hpa["spec"]["minReplicas"] == 0,
            target % step != 0.0,
        ];
        let broken = rules.into_iter().zip(include_str!("findings.txt").lines()).filter(|it| it.0);
        Ok(broken.map(|(_, why)| Error::new(Reason::InvalidRequest, why)).collect())
    }

    fn resource(&self, reference: &Value) -> Result<&'static Resource> {
        let (kind, version) = (text(reference, "/kind"), text(reference, "/apiVersion"));
        let group = version.rsplit_once('/').map_or("", |(group, _)| group);
        let mut all = Resource::all().chain(&self.handler.definitions.in_force().resources);
        let found = all.find(|it| (it.kind, it.group()) == (kind, group));
        found.ok_or_else(|| refusal!(NotFound, "{} of apiVersion {} has no metrics here", quoted(kind), quoted(version)))
    }

    /// The selector of the pods that the HPA scales.
    fn pods(&self) -> Result<String> {
        let (reference, place) = (&self.hpa["spec"]["scaleTargetRef"], self.place);
        let unknown = |_| refusal!(NotFound, "the server serves it, but explain does not know which pods {reference} selects");
        let (of, name) = (self.resource(reference).map_err(unknown)?, text(reference, "/name"));
        let query = format!("?fieldSelector=metadata.name%3D{}", percent_encode(name));
        let path = kube::path(of, &percent_encode(place), &query);
        let list = self.handler.kube.call(Method::GET, &path, JSON, None, of.plural)?;
        let found = items(&list, "/items").map(|it| selector(&it["spec"]["selector"])).find(|it| !it.is_empty());
        found.ok_or_else(|| refusal!(ObjectNotFound, "{} does not exist, or selects no pods", named(of, place, name)))
    }

    /// The path that the HPA controller asks for; `pods` selects what a Pods metric is of.
    /// Source: <https://github.com/kubernetes/kubernetes/blob/master/pkg/controller/podautoscaler/metrics/client.go>.
    fn request(&self, pods: &str) -> Result<String> {
        let Self { kind, spec, .. } = *self;
        let (metric, object) = (text(spec, "/metric/name"), text(spec, "/describedObject/name"));
        let [place, metric, object] = [self.place, metric, object].map(percent_encode);
        let base = format!("/apis/{GROUP}/v1beta2/namespaces/{place}");
        let (path, key) = match kind {
            "Object" => match self.resource(&spec["describedObject"])? {
                // The controller does not look at its name.
                &Resource::NAMESPACES => (format!("{base}/metrics/{metric}"), "?metricLabelSelector"),
                of => (format!("{base}/{}/{object}/{metric}", of.qualified()), "?metricLabelSelector"),
            },
            "Pods" => (format!("{base}/pods/%2A/{metric}?labelSelector={pods}"), "&metricLabelSelector"),
            "External" => (format!("/apis/{EXTERNAL}/v1beta1/namespaces/{place}/{metric}"), "?labelSelector"),
            _ => return Err(refusal!(InvalidRequest, "{} is no type of metric", quoted(kind))),
        };
        let labels = selector(&spec["metric"]["selector"]);
        Ok(if labels.is_empty() { path } else { format!("{path}{key}={labels}") })
    }

    /// The type of its target, and its thousandths. Errors: it does not fit.
    fn target(&self) -> Result<(&str, f64)> {
        let (of, kind) = (text(self.spec, "/target/type"), self.kind);
        let given = &self.spec["target"][if of == "Value" && kind != "Pods" { "value" } else { "averageValue" }];
        let found = thousandths(given.as_str().unwrap_or(&given.to_string())).filter(|it| *it > 0.0).map(|it| (of, it));
        let right = "a quantity above 0, of type AverageValue, or (not for Pods) Value";
        found.ok_or_else(|| refusal!(InvalidRequest, "the target of type {} is {given}: it must be {right}", quoted(of)))
    }

    /// What the controller makes of the values, and how. What it knows of single pods is not known here.
    /// Source: <https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details>.
    fn replicas(&self, of: &str, target: f64, values: &[f64]) -> String {
        let number = |pointer: &str| self.hpa.pointer(pointer).and_then(Value::as_u64).map(|it| it as f64);
        let least = number("/spec/minReplicas").unwrap_or(1.0);
        let omitted = if self.hpa["status"]["desiredReplicas"].is_null() { least } else { 0.0 };
        let (now, count) = (number("/status/currentReplicas").unwrap_or(omitted), values.len() as f64);
        if now == 0.0 && least > 0.0 {
            return "none: its target is scaled to 0 by hand, and the HPA leaves it alone".to_owned();
        }
        if self.kind == "Pods" && count != now {
            return format!("not known here: {count} of {now} pods have a value, and the HPA makes assumptions about the others");
        }
        // The controller computes with whole thousandths, of Pods of their mean; no pods at all count as one.
        let parts = if self.kind == "Pods" { count } else { 1.0 };
        let total = (values.iter().sum::<f64>() / parts).floor() * parts;
        let (pods, each) = if of == "Value" { (now.max(1.0), 1.0) } else { (1.0, now) };
        let steady = now > 0.0 && (total / (target * each) - 1.0).abs() <= 0.1;
        let wanted = if steady { now } else { (total / target * pods).ceil() };
        let result = wanted.min(number("/spec/maxReplicas").unwrap_or(f64::MAX)).max(least);
        let factor = if of == "Value" { format!("{pods} pods × ") } else { String::new() };
        let why = if steady { "as now: within the tolerance of 0.1" } else { "rounded up" };
        let (total, target) = (total / 1000.0, target / 1000.0);
        let assumed = "assuming that all pods of status.currentReplicas (else of minReplicas) are ready";
        format!("{result}: {factor}{total} ÷ {target} = {wanted} ({why}), then minReplicas and maxReplicas; {assumed}")
    }
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

/// Looks at all that the adapter needs. It changes nothing.
fn doctor(as_json: bool) -> Result<bool, String> {
    let (handler, now, mut lines) = (tools(None)?, unix_now(), Vec::new());
    let Handler { config, kube, sysdig, definitions, .. } = handler;
    let mut check = |name: &str, well: &str, found: Result<()>| {
        let word = metrics::outcome(&found);
        let status = if word == "ok" { "ok" } else { ["fail", "warn"][usize::from(name == "clock")] };
        let message = found.map_or_else(|it| it.to_string(), |()| well.to_owned());
        let _ = as_json || say(&format!("{status:<4}  {name:<32}  {message}"));
        lines.push(json!({ "check": name, "status": status, "word": word, "message": message }));
    };
    for ((group, version), served) in APIS.into_iter().zip([true, true, config.external]) {
        let (name, path) = (format!("{version}.{group}"), format!("/apis/{group}/{version}"));
        let slot = certs::slot(kube, &kube.own_namespace(), &name);
        let others = slot.as_ref().map_or_else(|it| it.message.clone(), |_| String::new());
        let take = if group == EXTERNAL { "add manifests/components/external-metrics" } else { ROLES };
        let found = match (slot, served) {
            (Ok((api, ..)), true) => kube.call(Method::GET, &path, JSON, None, &path).map(drop).map_err(|it| {
                let state = items(&api, "/status/conditions").find(|it| it["type"] == "Available");
                let state = quoted(state.map_or("nothing", |it| text(it, "/message")));
                let mend = "kubectl get pods,endpointslices -n custom-metrics; kubectl logs -n custom-metrics deployment/custom-metrics-apiserver";
                Error::new(it.reason, format!("{} (APIService: {state}): {mend}", it.message))
            }),
            (Ok(_), false) => Err(refusal!(ForeignSlot, "EXTERNAL_METRICS is off: kubectl delete apiservice {name}")),
            (Err(it), _) if it.reason == Reason::KubernetesUnavailable => Err(it),
            (Err(_), false) => Ok(()),
            (Err(it), true) => Err(Error::new(it.reason, format!("{}: {take}", it.message))),
        };
        check(&name, if served { "reaches the adapter, whose certificate its caBundle verifies" } else { &others }, found);
    }
    check("front proxy", "its CA and headers are known", kube.request_header().map(drop));
    let reviews = [["create", "authentication.k8s.io", "tokenreviews"], ["create", REVIEWS, "subjectaccessreviews"]];
    let all = Resource::all().chain([&Resource::ENDPOINT_SLICES]).chain(&definitions.in_force().resources);
    check("own permissions", "suffice", allowed(kube, None, all.map(|it| ["list", it.group(), it.plural]).chain(reviews)));
    let reads = [["get", GROUP, "*"], ["list", EXTERNAL, "*"]].into_iter().take(1 + usize::from(config.external));
    check("HPA controller", "may read all metrics", allowed(kube, Some(CONTROLLER), reads));
    let token = sysdig.catalogue().map(drop);
    check("Sysdig token", "reads the names of metrics", token.clone());
    let off = |(reason, _): &(Reason, u64)| Err(Error::new(*reason, "it is over 30 s off this node's: check NTP"));
    check("clock", "Sysdig's is within 30 s", token.and_then(|()| lock(&metrics::FAILING).get("clock").map_or(Ok(()), off)));
    let metric = if config.backend == "promql" { "sysdig_container_up" } else { "container.count" }.to_owned();
    let tuning = Tuning { group: "avg", window: 120, ..Tuning::DEFAULT };
    let question = Question { metric, tuning, resource: &Resource::CLUSTER, legacy: false, labels: Vec::new() };
    let none = |mend: &str| refusal!(NoData, "Sysdig has no sample of this cluster in that time: {mend}");
    let seen = |found: Result<bool>, mend| found.and_then(|seen| seen.then_some(()).ok_or_else(|| none(mend)));
    let set = "kubectl set env deployment/custom-metrics-apiserver -n custom-metrics CLUSTER_NAME=NAME";
    check("cluster name", "seen within a day", seen(sysdig.is_collected(&question, now), set));
    let rows = sysdig.rows(&question, &iter::once(Object::default()).unzip(), now);
    let alive = rows.map(|rows| rows.values().any(|row| row.value.is_some()));
    check("agent", "seen within two minutes", seen(alive, "kubectl get pods -A -o wide, for the Sysdig agent"));
    let _ = as_json && say(&json!(lines).to_string());
    Ok(lines.iter().all(|it| it["status"] != "fail"))
}

/// Whether we, or `user`, may do all of it: verb, group and resource. Errors: what may not be done.
fn allowed<'a>(kube: &Kube, user: Option<&str>, all: impl Iterator<Item = [&'a str; 3]>) -> Result<()> {
    let kind = if user.is_some() { "SubjectAccessReview" } else { "SelfSubjectAccessReview" };
    let (path, mut denied) = (format!("/apis/{REVIEWS}/v1/{}s", kind.to_ascii_lowercase()), Vec::new());
    for [verb, group, resource] in all {
        let groups = user.map(|_| ["system:serviceaccounts", "system:serviceaccounts:kube-system", "system:authenticated"]);
        let spec = json!({ "user": user, "groups": groups, "resourceAttributes": { "verb": verb, "group": group, "resource": resource } });
        let review = json!({ "apiVersion": format!("{REVIEWS}/v1"), "kind": kind, "spec": spec });
        let allowed = kube.call(Method::POST, &path, JSON, Some(&review), kind)?["status"]["allowed"] == true;
        denied.extend((!allowed).then(|| format!("{verb} {resource}.{group}")));
    }
    ensure!(denied.is_empty(), KubernetesForbidden, "there is no permission to {}: {ROLES}", denied.join(", "));
    Ok(())
}
