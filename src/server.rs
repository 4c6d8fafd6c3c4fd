//! The inner servers: tiny_http workers that answer from memory, and a bounded pool for what must wait.
//! A worker never waits for an upstream, so that health and discovery are answered at once whatever Sysdig does.

use crate::handler::{Asked, Class, Handler};
use crate::{api::Response, auth::User, config::Secret, error::refusal, lock, route::percent_decode};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::{path::Path, process, sync::Arc, sync::Mutex, thread, time::Duration, time::Instant};
use tiny_http::{Header, Request, Server};

const WORKERS: usize = 2;
/// What waits for longer than this has a caller who gave up.
const PATIENCE: Duration = Duration::from_secs(10);
const STACK: usize = 512 * 1024;

/// What must wait, and since when it does.
type Job = (Request, Asked, Instant);

pub(crate) fn start(handler: &Arc<Handler>, sockets: &[(Class, &Path)], threads: usize) -> Result<(), String> {
    let (queue, jobs) = sync_channel(threads * 8);
    let jobs = Arc::new(Mutex::new(jobs));
    for _ in 0..threads {
        let (handler, jobs) = (handler.clone(), jobs.clone());
        spawn("slow", move || while work(&handler, &jobs).is_some() {})?;
    }
    for &(class, path) in sockets {
        let server = Server::http_unix(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let server = Arc::new(server);
        for _ in 0..WORKERS {
            let (handler, server, queue) = (handler.clone(), server.clone(), queue.clone());
            spawn("worker", move || {
                while let Ok(request) = server.recv() {
                    dispatch(&handler, class, request, &queue);
                }
                // tiny_http accepts no more after an error. Kubernetes starts the pod's container anew.
                log::error!("the inner server has ended");
                process::exit(1);
            })?;
        }
    }
    Ok(())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let started = thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(work);
    started.map(drop).map_err(|error| format!("no thread could be started: {error}"))
}

fn dispatch(handler: &Handler, class: Class, request: Request, queue: &SyncSender<Job>) {
    let asked = asked(class, &request);
    if let Some(response) = guarded(|| handler.answer(&asked, false)) {
        return respond(request, response);
    }
    let refused = queue.try_send((request, asked, Instant::now())).err();
    if let Some(TrySendError::Full((request, ..)) | TrySendError::Disconnected((request, ..))) = refused {
        respond(request, overloaded());
    }
}

/// Does one job; None when there will be no more.
fn work(handler: &Handler, jobs: &Mutex<Receiver<Job>>) -> Option<()> {
    let (request, asked, since) = lock(jobs).recv().ok()?;
    let answer = if since.elapsed() > PATIENCE { None } else { guarded(|| handler.answer(&asked, true)) };
    respond(request, answer.unwrap_or_else(overloaded));
    Some(())
}

/// A bug costs one answer, not a thread of a bounded pool.
fn guarded(work: impl FnOnce() -> Option<Response>) -> Option<Response> {
    let bug = || refusal!(Internal, "the adapter has a bug; please report it with its log (kubectl logs)");
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Some(bug().response()))
}

fn overloaded() -> Response {
    let error = refusal!(Overloaded, "more metrics are being read than the adapter can wait for: ask again");
    error.retry_after(Some(1)).response()
}

fn asked(class: Class, request: &Request) -> Asked {
    let values = |name| request.headers().iter().filter(move |it| it.field.equiv(name)).map(|it| it.value.as_str());
    let first = |name| values(name).next().map(str::to_owned);
    let decoded = |text: &str| percent_decode(text, false);
    let named = |name| values(name).next().and_then(decoded).unwrap_or_default();
    let groups = values("X-Remote-Group").filter_map(decoded).collect();
    let mut user = User { name: named("X-Remote-User"), uid: named("X-Remote-Uid"), groups, ..User::default() };
    for header in request.headers() {
        let name = header.field.as_str().as_str().to_ascii_lowercase();
        let Some(key) = name.strip_prefix("x-remote-extra-") else { continue };
        // As at the API server, a key that is no encoding stands for itself.
        let values = user.extra.entry(decoded(key).unwrap_or_else(|| key.to_owned())).or_default();
        values.extend(decoded(header.value.as_str()));
    }
    Asked {
        class,
        method: request.method().as_str().to_owned(),
        target: request.url().to_owned(),
        accept: first("Accept"),
        if_none_match: first("If-None-Match"),
        authorization: values("Authorization").next().and_then(Secret::header),
        user,
    }
}

fn respond(request: Request, response: Response) {
    let answer = tiny_http::Response::from_data(response.body).with_status_code(response.status);
    let mut answer = answer.with_chunked_threshold(usize::MAX);
    let common = [("Content-Type", response.content_type), ("Cache-Control", "no-cache, private".to_owned())];
    for header in common.into_iter().chain(response.headers).flat_map(|(name, value)| Header::from_bytes(name, value)) {
        answer.add_header(header);
    }
    request.respond(answer).unwrap_or_else(|error| log::debug!("an answer could not be sent: {error}"));
}
