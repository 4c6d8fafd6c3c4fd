//! The live connections: how many there may be, who makes room for whom, and the end of them all.

use crate::prelude::*;
use std::net::{Shutdown, TcpStream};

/// How long a new connection waits for the end of one that was closed for it.
const ENDING: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(crate) struct Connections {
    pub(crate) places: usize,
    /// In the order they came.
    pub(crate) live: Mutex<BTreeMap<u64, Entry>>,
    pub(crate) gone: Condvar,
    /// Set by a signal to end: answers are the last of their connections; see [`Self::close_idle`].
    pub(crate) draining: Arc<AtomicBool>,
}

pub(crate) struct Entry {
    stream: Arc<TcpStream>,
    verified: bool,
    busy: bool,
    /// To make room; its thread still ends.
    closed: bool,
}

/// A connection's place; given back when dropped.
pub(crate) struct Ticket(&'static Connections, u64);

impl Connections {
    /// Takes a place. When all are taken, the oldest connection that proved nothing is closed for the new one: nobody
    /// can be kept out by silent peers. None if only verified peers hold them, or too many that were closed do not end.
    pub(crate) fn admit(&'static self, stream: &Arc<TcpStream>) -> Option<Ticket> {
        let mut live = lock(&self.live);
        // The other places are for connections that were closed and whose threads still end.
        let usable = self.places - (self.places / 4).max(1);
        if live.values().filter(|entry| !entry.closed).count() >= usable {
            let oldest = live.values_mut().find(|entry| !entry.verified && !entry.closed)?;
            let _ = oldest.stream.shutdown(Shutdown::Both);
            oldest.closed = true;
        }
        let room = self.gone.wait_timeout_while(live, ENDING, |live| live.len() >= self.places);
        let (mut live, patience) = room.unwrap_or_else(PoisonError::into_inner);
        if patience.timed_out() {
            return None;
        }
        let id = live.last_key_value().map_or(0, |(last, _)| last + 1);
        live.insert(id, Entry { stream: stream.clone(), verified: false, busy: false, closed: false });
        Some(Ticket(self, id))
    }

    /// Whether places are scarce, such that nobody unknown should hold one for long.
    pub(crate) fn crowded(&self) -> bool {
        lock(&self.live).len() > self.places / 4
    }

    /// Closes what waits for a request, and waits for what is being answered. True if no connection is left.
    pub(crate) fn close_idle(&self, patience: Duration) -> bool {
        let live = lock(&self.live);
        live.values().filter(|entry| !entry.busy).for_each(|entry| drop(entry.stream.shutdown(Shutdown::Read)));
        let ended = self.gone.wait_timeout_while(live, patience, |live| !live.is_empty());
        ended.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }
}

impl Ticket {
    /// Notes whether the peer proved who it is, and whether a request of it is being worked on.
    pub(crate) fn set(&self, verified: bool, busy: bool) {
        if let Some(entry) = lock(&self.0.live).get_mut(&self.1) {
            (entry.verified, entry.busy) = (verified, busy);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.0.live).remove(&self.1);
        self.0.gone.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    struct Pair {
        near: Arc<TcpStream>,
        far: TcpStream,
    }

    fn pair() -> Pair {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Pair { near: Arc::new(listener.accept().unwrap().0), far }
    }

    fn is_closed(pair: &mut Pair) -> bool {
        pair.far.set_nonblocking(true).unwrap();
        !matches!(pair.far.read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    }

    #[test]
    fn a_new_connection_takes_the_place_of_the_oldest_that_proved_nothing() {
        let connections = forever(Connections { places: 4, ..Connections::default() });
        let mut pairs: Vec<Pair> = (0..5).map(|_| pair()).collect();
        let mut tickets: Vec<Option<Ticket>> = pairs.iter().take(3).map(|pair| connections.admit(&pair.near)).collect();
        tickets[0].as_ref().unwrap().set(true, false);
        tickets.push(connections.admit(&pairs[3].near));
        assert!(tickets[3].is_some());
        assert_eq!([0, 1, 2].map(|at| is_closed(&mut pairs[at])), [false, true, false]);
        assert!(connections.admit(&pairs[4].near).is_none(), "what was closed keeps its place until it ends");
        assert!(is_closed(&mut pairs[2]) && connections.crowded());
        drop(tickets.drain(1..3));
        tickets.push(connections.admit(&pairs[2].near));
        tickets.iter().flatten().for_each(|ticket| ticket.set(true, false));
        assert!(connections.admit(&pairs[4].near).is_none(), "verified connections are never closed for a new one");
        tickets.remove(0);
        assert!(connections.admit(&pairs[4].near).is_some());
    }

    #[test]
    fn draining_closes_what_is_idle_and_waits_for_what_is_not() {
        let connections = forever(Connections { places: 3, ..Connections::default() });
        let (mut idle, busy) = (pair(), pair());
        let tickets = [connections.admit(&idle.near).unwrap(), connections.admit(&busy.near).unwrap()];
        tickets[1].set(false, true);
        connections.draining.store(true, Relaxed);
        assert!(connections.draining.load(Relaxed));
        assert!(!connections.close_idle(Duration::ZERO));
        assert_eq!((&*idle.near).read(&mut [0]).unwrap(), 0, "the idle connection reads its end");
        let [first, second] = tickets;
        drop(first);
        assert!(!connections.close_idle(Duration::ZERO));
        drop(second);
        assert!(connections.close_idle(Duration::ZERO));
        assert!(!is_closed(&mut idle), "closing is up to the connection's own thread");
    }
}
