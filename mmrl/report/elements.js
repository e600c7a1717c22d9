"use strict";
// What the scripts of the page share. Text reaches the document as text alone.

const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

const html = (name, attributes = {}, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};

/** Shows something large, over the page, until it is clicked. */
const enlarged = html("dialog", { id: "enlarged" });
document.body.append(enlarged);
enlarged.addEventListener("click", () => enlarged.close());

/** A line of the tip: a name and a value. */
const pair = (name, value) => html("p", {}, html("span", {}, name), html("b", {}, value));
