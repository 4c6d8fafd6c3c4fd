//! The objects of a cluster, and reads and writes of them.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};

use serde_json::{Value, json};

use super::super::http::{Reply, Request};
use super::path::{ApiPath, reason, status};
use super::selector::{matches_fields, matches_labels};

const META: &str = "g=meta.k8s.io";

/// Objects by API path, such as `/apis/apps/v1/namespaces/default/deployments/kuard`.
#[derive(Debug, Default)]
pub struct Store {
    objects: BTreeMap<String, Value>,
    revision: u64,
}

/// The form in which an object is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Form {
    Full,
    /// The content type of the answer.
    Metadata(String),
}

/// Status code and message of a refusal.
type Refusal = (u16, String);

impl Deref for Store {
    type Target = BTreeMap<String, Value>;

    fn deref(&self) -> &Self::Target {
        &self.objects
    }
}

impl DerefMut for Store {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.objects
    }
}

impl Store {
    /// Writes an object with a new resourceVersion, and with the metadata and type that its path tells.
    pub fn put(&mut self, path: &str, mut object: Value) -> Value {
        let parsed = ApiPath::parse(path).filter(|parsed| parsed.name.is_some());
        let parsed = parsed.unwrap_or_else(|| panic!("{path} is no path of an object"));
        self.revision += 1;
        let default = |object: &mut Value, key: &str, value: Value| {
            if object[key].is_null() {
                object[key] = value;
            }
        };
        default(&mut object, "apiVersion", json!(parsed.api_version()));
        default(&mut object, "kind", json!(parsed.kind()));
        default(&mut object, "metadata", json!({}));
        let metadata = &mut object["metadata"];
        default(metadata, "name", json!(parsed.name));
        if parsed.namespace.is_some() {
            default(metadata, "namespace", json!(parsed.namespace));
        }
        default(metadata, "uid", json!(format!("00000000-0000-4000-8000-{:012}", self.revision)));
        default(metadata, "creationTimestamp", json!("2026-01-01T00:00:00Z"));
        metadata["resourceVersion"] = json!(self.revision.to_string());
        self.objects.insert(path.to_owned(), object.clone());
        object
    }

    /// Answers a request to a resource. `path` is that of the request.
    pub fn answer(&mut self, request: &Request, path: &ApiPath) -> Reply {
        let answered = match (request.method.as_str(), &path.name) {
            ("GET", Some(_)) => self.get(request, path),
            ("GET", None) => self.list(request, path),
            ("POST", None) => self.create(request),
            ("PUT", Some(_)) => self.replace(request, path),
            ("PATCH", Some(_)) => self.patch(request, path),
            ("DELETE", Some(_)) => self.current(request, path).map(|object| {
                self.objects.remove(request.route());
                Reply::json(200, &object)
            }),
            _ => Err((405, "the server does not allow this method on the requested resource".to_owned())),
        };
        answered.unwrap_or_else(|(code, message)| {
            let word = if code == 409 && request.method == "POST" { "AlreadyExists" } else { reason(code) };
            Reply::json(code, &status(code, word, &message))
        })
    }

    fn get(&self, request: &Request, path: &ApiPath) -> Result<Reply, Refusal> {
        let object = self.current(request, path)?;
        Ok(match form(request, "PartialObjectMetadata")? {
            Form::Full => Reply::json(200, &object),
            Form::Metadata(content_type) => Reply::typed(200, &content_type, partial(&object).to_string()),
        })
    }

    fn list(&self, request: &Request, path: &ApiPath) -> Result<Reply, Refusal> {
        let parameter = |name: &str| request.parameter(name).unwrap_or_default();
        let (labels, fields, after) = (parameter("labelSelector"), parameter("fieldSelector"), parameter("continue"));
        let limit = parameter("limit").parse().ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
        let form = form(request, "PartialObjectMetadataList")?;
        let mut found = Vec::new();
        for (place, object) in &self.objects {
            let here = ApiPath::parse(place).is_some_and(|object| path.holds(&object)) && *place > after;
            let bad = |message: String| (400, message);
            if here && matches_labels(&labels, object).map_err(bad)? && matches_fields(&fields, object).map_err(bad)? {
                found.push((place, object));
            }
        }
        let mut metadata = json!({ "resourceVersion": self.revision.to_string() });
        if found.len() > limit {
            metadata["continue"] = json!(found[limit - 1].0);
            metadata["remainingItemCount"] = json!(found.len() - limit);
            found.truncate(limit);
        }
        let objects = found.into_iter().map(|(_, object)| object);
        Ok(match form {
            Form::Full => {
                let items: Vec<Value> = objects.map(untyped).collect();
                let (kind, version) = (format!("{}List", path.kind()), path.api_version());
                Reply::json(200, &json!({ "kind": kind, "apiVersion": version, "metadata": metadata, "items": items }))
            }
            Form::Metadata(content_type) => {
                let items: Vec<Value> = objects.map(partial).collect();
                let (kind, version) = ("PartialObjectMetadataList", "meta.k8s.io/v1");
                let body = json!({ "kind": kind, "apiVersion": version, "metadata": metadata, "items": items });
                Reply::typed(200, &content_type, body.to_string())
            }
        })
    }

    fn create(&mut self, request: &Request) -> Result<Reply, Refusal> {
        let object = body(request)?;
        let name = object["metadata"]["name"].as_str().ok_or_else(|| (422, "metadata.name: Required value".to_owned()))?;
        let place = format!("{}/{name}", request.route());
        if self.objects.contains_key(&place) {
            let quoted = ApiPath::parse(&place).map(|path| path.quoted()).unwrap_or_default();
            return Err((409, format!("{quoted} already exists")));
        }
        Ok(Reply::json(201, &self.put(&place, object)))
    }

    fn replace(&mut self, request: &Request, path: &ApiPath) -> Result<Reply, Refusal> {
        let (current, object) = (self.current(request, path)?, body(request)?);
        refuse_stale(&current, &object, path)?;
        Ok(Reply::json(200, &self.put(request.route(), object)))
    }

    fn patch(&mut self, request: &Request, path: &ApiPath) -> Result<Reply, Refusal> {
        if request.header("content-type") != Some("application/merge-patch+json") {
            return Err((415, "the body of the request was in an unknown format".to_owned()));
        }
        let (mut object, patch) = (self.current(request, path)?, body(request)?);
        refuse_stale(&object, &patch, path)?;
        merge(&mut object, patch);
        Ok(Reply::json(200, &self.put(request.route(), object)))
    }

    fn current(&self, request: &Request, path: &ApiPath) -> Result<Value, Refusal> {
        let object = self.objects.get(request.route()).cloned();
        object.ok_or_else(|| (404, format!("{} not found", path.quoted())))
    }
}

/// The first form of the Accept header that there is. Errors: there is none.
fn form(request: &Request, partial: &str) -> Result<Form, Refusal> {
    let accept = request.header("accept").unwrap_or("*/*");
    for entry in accept.split(',').map(str::trim) {
        let mut parts = entry.split(';').map(str::trim);
        let is_json = matches!(parts.next(), Some("application/json" | "application/*" | "*/*"));
        let parameters: Vec<&str> = parts.filter(|part| !part.starts_with("q=")).collect();
        let is = |wanted: &str| parameters.contains(&wanted);
        if is_json && !parameters.iter().any(|part| part.starts_with("as=")) {
            return Ok(Form::Full);
        }
        if is_json && is(&format!("as={partial}")) && is(META) && is("v=v1") {
            return Ok(Form::Metadata(entry.to_owned()));
        }
    }
    Err((406, "only the following media types are accepted: application/json".to_owned()))
}

fn partial(object: &Value) -> Value {
    json!({ "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"] })
}

/// Without kind and apiVersion: the items of a list have none.
fn untyped(object: &Value) -> Value {
    let mut item = object.clone();
    if let Some(fields) = item.as_object_mut() {
        fields.remove("kind");
        fields.remove("apiVersion");
    }
    item
}

fn body(request: &Request) -> Result<Value, Refusal> {
    let object = serde_json::from_slice(&request.body).ok().filter(Value::is_object);
    object.ok_or_else(|| (400, "the object provided is unrecognized".to_owned()))
}

fn refuse_stale(current: &Value, fresh: &Value, path: &ApiPath) -> Result<(), Refusal> {
    let version = &fresh["metadata"]["resourceVersion"];
    if version.is_null() || *version == current["metadata"]["resourceVersion"] {
        return Ok(());
    }
    let what = path.quoted();
    let advice = "the object has been modified; please apply your changes to the latest version and try again";
    Err((409, format!("Operation cannot be fulfilled on {what}: {advice}")))
}

/// RFC 7386.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(fields) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in fields {
        if value.is_null() {
            target.as_object_mut().expect("it was made an object").remove(&key);
        } else {
            merge(&mut target[key.as_str()], value);
        }
    }
}
