// Talks to the server; the API key lives in this tab's sessionStorage and nowhere else.

const BASE = new URL("../v1/adaspark/traces", location.href).href;
const KEY = "adaspark-api-key";

export class Unauthorized extends Error {}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(BASE + path, { ...options, headers });
  if (response.status === 401) {
    sessionStorage.removeItem(KEY);
    throw new Unauthorized(key ? "The server refuses this key." : "");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    const detail = body.detail ?? body.error?.message;
    throw new Error(typeof detail === "string" ? detail : `HTTP ${response.status} for ${path}`);
  }
  return response;
}

const json = async (path) => (await request(path)).json();

export const listTraces = async () => (await json("")).traces;
export const getTrace = (id) => json(`/${id}`);
export const getHeat = (id, source) => json(`/${id}/heat?source=${encodeURIComponent(source)}`);
export const deleteTrace = (id) => request(`/${id}`, { method: "DELETE" });

export async function getFfn(id) {
  const ffn = await json(`/${id}/ffn`);
  return { ...ffn, ran: ffn.ran.map(bytes), recorded: bytes(ffn.recorded) };
}

export async function getFrame(id, video, number) {
  const response = await request(`/${id}/frames/${video}/${number}.jpg`);
  return createImageBitmap(await response.blob());
}

export function bytes(base64) {
  return Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
}
