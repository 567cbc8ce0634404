// The server's API, as any client uses it.

const REMEDIES = {
  401: "The server wants its key: try again, and give it.",
  403: "The server doesn't answer under this address:",
  413: "Send less:",
  429: "The server is busy: try again",
  503: "Try again when the server has been restarted:",
  504: "Ask for a shorter answer:",
};
const GONE =
  "The server can't be reached. Nothing is lost: start the server again, or check the " +
  "connection, then try again.";
const LOST =
  "The connection broke before the answer's end. What was written is kept: continue it or retry.";

/** An answer other than the one asked for; its message says what to do. */
export class ApiError extends Error {}

function errorOf(status, body, wait = null) {
  const message = body?.error?.message ?? `The server answered with status ${status}.`;
  const when = wait ? `in ${wait} seconds.` : "in a while.";
  const details = { 401: "", 429: when }[status] ?? message;
  return new ApiError(`${REMEDIES[status] ?? ""} ${details}`.trim());
}

export class Api {
  key = sessionStorage.getItem("llama-key");

  /** `askKey(isWrong)` resolves to the key that a person gives, empty if there is none. */
  constructor(askKey) {
    this.askKey = askKey;
  }

  async request(path, body, signal) {
    const { key } = this;
    const headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    const sent = body && { method: "POST", body: JSON.stringify(body) };
    // Without "omit" the browser asks for the key too, in a window of its own.
    const options = { ...sent, headers, signal, credentials: "omit" };
    const response = await fetch(path, options).catch((error) => {
      throw signal?.aborted ? error : new ApiError(GONE);
    });
    const { ok, status } = response;
    if (ok) return response;
    if (status === 401 && (await this.hasNewKey(key))) return this.request(path, body, signal);
    const found = await response.json().catch(() => null);
    throw errorOf(status, found, response.headers.get("Retry-After"));
  }

  async hasNewKey(refused) {
    if (this.key !== refused) return true;
    this.asking ??= this.askKey(refused !== null); // once for all requests that were refused
    const key = await this.asking;
    this.asking = null;
    if (!key) return false;
    this.key = key;
    sessionStorage.setItem("llama-key", key);
    return true;
  }

  json = async (path, body) => (await this.request(path, body)).json();

  /** Yield the objects of a response's server-sent events. */
  async *stream(path, body, signal) {
    const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this.request(path, streamed, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    try {
      for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
        const lines = (rest + part.value).split("\n");
        rest = lines.pop();
        for (const line of lines.filter((each) => each.startsWith("data:"))) {
          if (line.slice(5).trim() === "[DONE]") return;
          const event = JSON.parse(line.slice(5));
          if (event.error) throw errorOf(0, event);
          yield event;
        }
      }
    } catch (error) {
      if (signal.aborted || error instanceof ApiError) throw error;
    } finally {
      reader.cancel().catch(() => {});
    }
    throw new ApiError(LOST);
  }
}
