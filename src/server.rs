//! The inner servers: tiny_http workers that answer from memory, and a bounded pool for what must wait.
//! A worker never waits for an upstream, so that health and discovery are answered at once whatever Sysdig does.

use crate::handler::{Asked, Handler, WAIT, Wait};
use crate::prelude::*;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::{io, panic::AssertUnwindSafe, panic::catch_unwind, path::Path, process};
use tiny_http::Server;

const WORKERS: usize = 2;
/// What must wait for the Kubernetes API's reviews, and then for Sysdig: neither holds up the other.
const SLOW: [(Wait, usize); 2] = [(Wait::Sysdig, 32), (Wait::Reviews, 8)];
const QUEUE: usize = 256;
/// What waits for longer than this has a caller who gave up.
const PATIENCE: Duration = Duration::from_secs(10);
const STACK: usize = 512 * 1024;

pub(crate) fn start(handler: &'static Handler, sockets: [(bool, &Path); 2]) -> io::Result<()> {
    let mut next: Option<SyncSender<Asked>> = None;
    for (wait, threads) in SLOW {
        let (queue, jobs) = sync_channel(QUEUE);
        let (jobs, next) = (forever(Mutex::new(jobs)), next.replace(queue));
        crew("slow", threads, move || {
            iter::from_fn(|| lock(jobs).recv().ok()).for_each(|asked| dispatch(handler, asked, wait, next.as_ref()));
        })?;
    }
    for (front_proxy, path) in sockets {
        let server = Server::http_unix(path).map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
        let (server, next) = (forever(server), next.clone());
        crew("worker", WORKERS, move || {
            while let Ok(request) = server.recv() {
                let asked = Asked { request, front_proxy, since: Instant::now(), user: String::new() };
                dispatch(handler, asked, Wait::Nothing, next.as_ref());
            }
            // tiny_http accepts no more after an error. Kubernetes starts the pod's container anew.
            log::error!("the inner server has ended");
            process::exit(1);
        })?;
    }
    Ok(())
}

/// As many threads for the same work.
pub(crate) fn crew(name: &str, threads: usize, work: impl FnOnce() + Clone + Send + 'static) -> io::Result<()> {
    (0..threads).try_for_each(|_| spawn(name, work.clone()))
}

pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let started = thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(work);
    started.map(drop).map_err(|error| io::Error::other(format!("no thread could be started: {error}")))
}

/// Answers, or hands over to `next`, where it may wait for longer.
fn dispatch(handler: &Handler, mut asked: Asked, wait: Wait, next: Option<&SyncSender<Asked>>) {
    let late = asked.since.elapsed() > PATIENCE;
    let answer = guarded(|| if late { Err(WAIT) } else { handler.answer(&mut asked, wait) });
    let handed = match next.filter(|_| matches!(answer, Err(WAIT)) && !late) {
        Some(next) => next.try_send(asked),
        None => Err(TrySendError::Full(asked)),
    };
    let Err(TrySendError::Full(asked) | TrySendError::Disconnected(asked)) = handed else { return };
    let overloaded = || refusal!(Overloaded, "more metrics are being read than the adapter can wait for: ask again");
    let answer = answer.map_err(|stop| stop.unwrap_or_else(|| Error { retry_after: Some(1), ..overloaded() }));
    let outcome = answer.as_ref().map_or_else(|error| format!("{}: {}", error.reason.word(), error.message), |_| "ok".to_owned());
    let response = answer.unwrap_or_else(|error| error.response());
    let Asked { request, since, user, .. } = asked;
    let (method, target, status) = (request.method(), request.url(), response.status_code().0);
    log::debug!("{method} {target} by {user:?} in {:?}: {status} {outcome}", since.elapsed());
    request.respond(response).unwrap_or_else(|error| log::debug!("an answer could not be sent: {error}"));
}

/// A bug costs one answer, not a thread of a bounded pool.
pub(crate) fn guarded<T, E: From<Error>>(work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let bug = || refusal!(Internal, "the adapter has a bug; please report it with its log (kubectl logs)");
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(bug().into()))
}
