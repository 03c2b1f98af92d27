// The events of the server. A browser opens six connections to a server at most, and one that listens holds its own for
// as long as it is open: so all pages of a browser listen through one shared worker, which is this file too.

const NAMES = ["session", "state", "gap", "caption", "answer", "memory", "question"];
const KEPT_EVENTS = 20000;
const RETRY_MILLISECONDS = 2000;

// Call `tell` with lists of [name, JSON]: the server's events; "lost" while there is no connection; "restart" where
// everything comes again from the beginning.
export function listen(tell) {
  const connection = new EventSource("/events");
  for (const name of NAMES) {
    connection.addEventListener(name, (message) => tell([[name, message.data]]));
  }
  connection.onerror = () => {
    tell([["lost", "{}"]]);
    if (connection.readyState === EventSource.CLOSED) {
      // Refused rather than interrupted: the browser doesn't try again by itself.
      setTimeout(() => {
        tell([["restart", "{}"]]);
        listen(tell);
      }, RETRY_MILLISECONDS);
    }
  };
}

function share() {
  const pages = new Set();
  let run = null;
  let session = null; // the latest message of each of these kinds, and all others of this run
  let lost = null;
  let kept = [];
  let forgotten = 0;
  let listening = false;

  function take(messages) {
    for (const message of messages) {
      const [name, data] = message;
      lost = name === "lost" ? message : null;
      if (name === "restart") {
        run = null;
      } else if (name === "session") {
        if (run !== JSON.parse(data).run) {
          run = JSON.parse(data).run;
          kept = [];
          forgotten = 0;
        }
        session = message;
      } else if (name !== "lost") {
        kept.push(message);
        if (kept.length > 1.25 * KEPT_EVENTS) {
          forgotten += kept.length - KEPT_EVENTS;
          kept = kept.slice(-KEPT_EVENTS);
        }
      }
    }
    for (const page of pages) {
      page.postMessage(messages);
    }
  }

  self.onconnect = ({ ports: [page] }) => {
    pages.add(page);
    page.onmessage = () => pages.delete(page); // it is closed
    const gap = forgotten ? [["gap", JSON.stringify({ lost: forgotten })]] : [];
    page.postMessage(session ? [session, ...gap, ...kept, ...(lost ? [lost] : [])] : []);
    if (!listening) {
      listening = true;
      listen(take);
    }
  };
}

if ("SharedWorkerGlobalScope" in self) {
  share();
}
