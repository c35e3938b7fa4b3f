"use strict";

/* Every word that the stepper shows, in both languages of the chapter. `{name}` is filled in. */
const STEPPER_WORDS = {
  problem: { en: "Problem", zh: "问题" },
  full: { en: "full: every key is visible", zh: "全部可见：每个键都可见" },
  causal: { en: "causal: no later key", zh: "因果：看不到后面的键" },
  window: { en: "window: 3 keys before, 1 after", zh: "窗口：前 3 个键，后 1 个键" },
  group: { en: "GQA: two query heads share a kv head", zh: "GQA：两个查询头共用一个键值头" },
  packed: { en: "packed: two sequences in one tensor", zh: "打包：一个张量中的两个序列" },
  unseen: { en: "rows that see no key", zh: "看不到任何键的行" },
  huge: { en: "one huge logit", zh: "一个巨大的 logit" },
  split: { en: "split keys, merged by LSE", zh: "切分键，再按 LSE 合并" },
  half: { en: "fp16: exponents of 2", zh: "fp16：以 2 为底的指数" },
  edges: { en: "the backward pass with a window", zh: "带窗口的反向传播" },
  backward: { en: "the backward pass (causal)", zh: "反向传播（因果）" },
  about_full: {
    en:
      "8 queries, 12 keys. Each program owns a block of 4 queries and walks over all tiles" +
      " of 4 keys.",
    zh: "8 个查询，12 个键。每个程序负责一块 4 个查询，走过所有 4 个键的瓦片。",
  },
  about_causal: {
    en:
      "12 queries and keys; query i sees the keys up to i. Tiles above the diagonal are" +
      " never loaded, and only tiles on it need a mask. The block with most tiles starts" +
      " first.",
    zh:
      "12 个查询和键；查询 i 看得到的键到 i 为止。对角线以上的瓦片从不载入，只有对角线上的" +
      "瓦片需要掩码。瓦片最多的块最先开始。",
  },
  about_window: {
    en:
      "12 queries and keys; query i sees the keys i - 3 to i + 1. The first tile starts at" +
      " the first visible key, which need not be a multiple of 4.",
    zh:
      "12 个查询和键；查询 i 看得到键 i - 3 到 i + 1。第一个瓦片从第一个可见的键开始，它不" +
      "必是 4 的倍数。",
  },
  about_group: {
    en:
      "2 query heads of 4 queries read the same kv head of 8 keys: both programs load the" +
      " same keys, and no copy of them is made.",
    zh:
      "2 个查询头各有 4 个查询，读同一个有 8 个键的键值头：两个程序载入同样的键，不为它们复" +
      "制任何东西。",
  },
  about_packed: {
    en:
      "Sequences of 3 and 7 tokens, one after the other, causal. The grid has room for the" +
      " blocks of the longest one; a program without a block ends at once.",
    zh: "长度为 3 和 7 的两个序列首尾相接，因果。网格按最长序列的块数开设；没有块的程序立刻结束。",
  },
  about_unseen: {
    en:
      "8 queries, 3 keys, causal and aligned at the end: queries 0 to 4 see no key. For the" +
      " first block no tile is visited. In the second, m of query 4 stays the least finite" +
      " number and not -inf, so that no -inf - -inf arises; l stays 0. Such rows give 0," +
      " and an LSE of -inf.",
    zh:
      "8 个查询，3 个键，因果，末端对齐：查询 0 到 4 看不到任何键。第一块不访问任何瓦片。在" +
      "第二块中，查询 4 的 m 一直是最小的有限数而不是 -inf，所以不会出现 -inf - -inf；l 保" +
      "持为 0。这样的行输出 0，LSE 为 -inf。",
  },
  about_huge: {
    en:
      "Key 5 has scores whose exponentials overflow fp32. The naive softmax below divides" +
      " inf by inf; the running maximum keeps every exponent at or below 0.",
    zh:
      "键 5 的分数大到其指数值在 fp32 中上溢。下面照原式的 softmax 用 inf 除以 inf；运行最" +
      "大值使每个指数都不超过 0。",
  },
  about_split: {
    en:
      "One query, 12 keys: as when a model generates. Two programs take half of the keys" +
      " each; the parts are merged as two keys of score LSE.",
    zh:
      "1 个查询，12 个键：与模型生成时相同。两个程序各取一半的键；两部分像两个分数为 LSE 的" +
      "键那样合并。",
  },
  about_half: {
    en:
      "In half precision log2(e) is multiplied into the scale once, so m is an exponent of" +
      " 2. Each row's denominator is kept as four sums, one a thread on a GPU, and added up" +
      " at the end. Tiles of 8 keys.",
    zh:
      "在半精度中，log2(e) 只乘进缩放因子一次，所以 m 是 2 的指数。每行的分母保存为四个和，" +
      "在 GPU 上每个线程一个，最后才相加。瓦片有 8 个键。",
  },
  about_edges: {
    en:
      "8 queries and keys, causal; query i sees the keys i - 4 to i. Seen from a block of" +
      " keys, the tiles on both edges of the window need a mask. The kernel is compiled for" +
      " as many tiles on an edge as there may be; one without a query adds nothing.",
    zh:
      "8 个查询和键，因果；查询 i 看得到键 i - 4 到 i。从一块键来看，窗口两侧边缘上的瓦片都" +
      "需要掩码。内核按边缘上最多可能有的瓦片数编译；没有查询的瓦片什么也不加。",
  },
  about_backward: {
    en:
      "8 queries and keys, causal. First δ; then dK and dV: each program owns a block of" +
      " keys and walks over queries; then dQ: each owns a block of queries and walks over" +
      " keys. P is rebuilt from the LSE.",
    zh:
      "8 个查询和键，因果。先算 δ；再算 dK 和 dV：每个程序负责一块键，走过查询；然后算 dQ：" +
      "每个程序负责一块查询，走过键。P 由 LSE 重新算出。",
  },

  first: { en: "First step", zh: "第一步" },
  back: { en: "Back", zh: "后退" },
  forth: { en: "Forward", zh: "前进" },
  last: { en: "Last step", zh: "最后一步" },
  tileBack: { en: "Previous tile", zh: "上一个瓦片" },
  tileForth: { en: "Next tile", zh: "下一个瓦片" },
  step: { en: "Step", zh: "步" },
  stepOf: { en: "step {step} of {steps}", zh: "第 {step} 步，共 {steps} 步" },
  help: {
    en: "Arrow keys: one step. Page Up and Page Down: one tile. Home and End: first and last step.",
    zh: "方向键：一步。Page Up 和 Page Down：一个瓦片。Home 和 End：第一步和最后一步。",
  },
  programs: { en: "Programs, in the order in which they ran", zh: "各程序，按运行的顺序" },
  forward_kernel: { en: "{rows}", zh: "{rows}" },
  partOf: { en: "part {part}: {rows}", zh: "第 {part} 部分：{rows}" },
  dkdv_kernel: { en: "dK, dV: {rows}", zh: "dK、dV：{rows}" },
  dq_kernel: { en: "dQ: {rows}", zh: "dQ：{rows}" },
  delta_kernel: { en: "δ", zh: "δ" },
  merge_kernel: { en: "all parts", zh: "合并" },
  absent: { en: "no block", zh: "没有块" },

  matrix: {
    en: "Score matrix, head {head}: queries down, keys across",
    zh: "分数矩阵，头 {head}：行为查询，列为键",
  },
  noTile: { en: "No tile yet.", zh: "还没有瓦片。" },
  tileHolds: { en: "The tile holds {what}.", zh: "瓦片中是{what}。" },
  holds_load: { en: "nothing yet", zh: "尚未算出的数" },
  holds_scores: { en: "scores s", zh: "分数 s" },
  holds_mask: { en: "scores s, masked", zh: "加了掩码的分数 s" },
  holds_p: { en: "exponentials p", zh: "指数值 p" },
  holds_rebuild: { en: "probabilities p", zh: "概率 p" },
  holds_dp: { en: "dP, the gradient of p", zh: " p 的梯度 dP" },
  holds_ds: { en: "dS, the gradient of s", zh: " s 的梯度 dS" },
  legend_now: { en: "the tile", zh: "瓦片" },
  legend_hidden: { en: "masked", zh: "被遮住" },
  legend_past: { en: "visited, not kept", zh: "已访问，不保存" },
  legend_skipped: { en: "skipped, never loaded", zh: "跳过，从不载入" },
  cell_past: { en: "visited", zh: "已访问" },
  cell_skipped: { en: "skipped", zh: "跳过" },

  registers: { en: "State of the program, in registers", zh: "程序的状态，在寄存器中" },
  parts: { en: "The parts", zh: "各部分" },
  state: { en: "Their state", zh: "它们的状态" },
  none: { en: "Nothing yet.", zh: "还没有。" },
  comma: { en: ", ", zh: "、" },
  was: { en: "was {number}", zh: "原为 {number}" },
  memory_q: { en: "Written to memory", zh: "写入内存的结果" },
  memory_k: { en: "Written to memory, of the keys", zh: "写入内存的结果（键）" },
  headRow: { en: "head {head}, {row}", zh: "头 {head}，{row}" },
  partRow: { en: "part {part}", zh: "第 {part} 部分" },
  naive: {
    en: "For comparison, the naive softmax in fp32: exp of each score, their sum, and the output",
    zh: "作为比较，fp32 中照原式的 softmax：每个分数的指数值、它们的和，以及输出",
  },
  moved: {
    en:
      "Bytes moved by this program: {loaded} loaded, {stored} stored; by all programs so" +
      " far: {allLoaded} and {allStored}. ",
    zh:
      "本程序移动的字节数：载入 {loaded}，写出 {stored}；至此所有程序：{allLoaded} 和 {allS" +
      "tored}。",
  },
  spared: {
    en: "Tiles of scores so far: {tiles}, {spared} bytes that never went to memory.",
    zh: "至此的分数瓦片：{tiles} 个，共 {spared} 字节，从未进入内存。",
  },
  byHand: { en: "By hand, query {q} and key {k}:", zh: "手算，查询 {q} 与键 {k}：" },
  pairByHand: { en: "By hand, key {k} and query {q}:", zh: "手算，键 {k} 与查询 {q}：" },
  sourceTitle: {
    en: "The line that just ran: {file}, line {line}",
    zh: "刚刚运行的一行：{file}，第 {line} 行",
  },
  formulaTitle: { en: "Formula", zh: "公式" },

  init: {
    en:
      "Load {rows}. Nothing is known of any key yet: m is the least finite number, l and" +
      " acc are 0.",
    zh: "载入 {rows}。还不知道任何键：m 是最小的有限数，l 和 acc 为 0。",
  },
  ranges: {
    en: "Keys visible to {rows}: {keys}.{skipped}{full}",
    zh: "{rows} 可见的键：{keys}。{skipped}{full}",
  },
  rangesQueries: {
    en: "Queries to which {rows} are visible: {keys}.{skipped}{full}",
    zh: "看得到 {rows} 的查询：{keys}。{skipped}{full}",
  },
  rangesNone: {
    en: "Keys visible to {rows}: none. The program visits no tile.",
    zh: "{rows} 可见的键：没有。这个程序不访问任何瓦片。",
  },
  otherParts: { en: " The others are another part's.", zh: "其余的属于另一部分。" },
  skippedKeys: { en: " All others are skipped: never loaded.", zh: "其余的全部跳过，从不载入。" },
  fullKeys: {
    en: " In {full} every pair is visible: no mask is needed.",
    zh: "{full} 中每一对都可见：不需要掩码。",
  },
  load: {
    en: "Next tile: {tile}, {bytes} bytes of keys.{range}",
    zh: "下一个瓦片：{tile}，键共 {bytes} 字节。{range}",
  },
  loadQueries: {
    en: "Next tile: {tile}, {bytes} bytes of queries.{range}",
    zh: "下一个瓦片：{tile}，查询共 {bytes} 字节。{range}",
  },
  loadEmpty: {
    en:
      "A tile without a query: how many tiles an edge has is fixed when the kernel is" +
      " compiled. It adds nothing.",
    zh: "没有查询的瓦片：边缘有几个瓦片在编译内核时就固定了。它什么也不加。",
  },
  edge: { en: " The edge of what is visible crosses it.", zh: "可见范围的边缘穿过它。" },
  whole: { en: " All of its pairs are visible.", zh: "其中每一对都可见。" },
  scores: {
    en: "Scores: each query times each key of the tile, as a dot product. The scale is 1 here.",
    zh: "分数：每个查询与瓦片中每个键的点积。这里的缩放因子为 1。",
  },
  mask: {
    en: "{hidden} of {pairs} pairs are hidden: their scores become -inf.",
    zh: "{pairs} 对中有 {hidden} 对被遮住：它们的分数变为 -inf。",
  },
  max: { en: "The running maximum m: {changed}", zh: "运行最大值 m：{changed}" },
  maxFirst: { en: "set for the first time in {rows}.", zh: "{rows} 第一次有了最大值。" },
  maxRises: { en: "it rises for {rows}.", zh: "{rows} 的最大值上升。" },
  maxStays: { en: "it stays as it is.", zh: "没有变化。" },
  rescale: {
    en: "The rescale factor α, for what was summed before: {changed}",
    zh: "重缩放因子 α，用于此前累加的结果：{changed}",
  },
  rescaleFirst: {
    en: "nothing was. α is 0 where m rose from the least number, and 0 · 0 is 0.",
    zh: "此前还没有累加。m 从最小的数上升之处 α 为 0，而 0 · 0 得 0。",
  },
  rescaleSome: {
    en: "below 1 for {rows}, whose maximum rose.",
    zh: "{rows} 的最大值上升，因子小于 1。",
  },
  rescaleNone: { en: "1 in every row, so nothing changes.", zh: "每一行都是 1，所以没有变化。" },
  p: {
    en: "Exponentials p of the scores less the new maximum: none is above 1, so none overflows.",
    zh: "指数值 p，取自分数减去新的最大值：没有一个大于 1，所以不会上溢。",
  },
  sum: {
    en: "The running sum l: the old one times α, plus the sum of each row of p.",
    zh: "累加和 l：旧的累加和乘以 α，再加上 p 每行的和。",
  },
  acc: {
    en: "The accumulator: the old one times α, plus p times the values of the tile.",
    zh: "累加器 acc：旧的累加器乘以 α，再加上 p 乘以瓦片中的值。",
  },
  out: {
    en: "All visible keys are done: acc divided by l is the output, and it is stored.{unseen}",
    zh: "可见的键都处理完了：acc 除以 l 就是输出，写入内存。{unseen}",
  },
  outUnseen: {
    en: " Where l is 0 ({rows}) no key was visible: acc is divided by 1, and the output is 0.",
    zh: "l 为 0 处（{rows}）没有可见的键：acc 除以 1，输出为 0。",
  },
  lse: {
    en:
      "The log-sum-exp of each row is stored for the backward pass: one number in place of" +
      " m and l.",
    zh: "每行的对数-求和-指数写入内存，供反向传播使用：一个数代替 m 和 l 两个。",
  },
  missing: {
    en:
      "This sequence has fewer blocks than the longest one: the program has nothing to do" +
      " and ends.",
    zh: "这个序列的块比最长的序列少：这个程序没有事做，就此结束。",
  },

  parts_max: {
    en: "The merge: each part is one key whose score is its LSE. The maximum of the LSEs.",
    zh: "合并：每一部分是一个键，其分数就是它的 LSE。取各 LSE 的最大值。",
  },
  parts_p: {
    en: "The weight of each part: exp of its LSE less the maximum.",
    zh: "每一部分的权重：它的 LSE 减去最大值，再取指数值。",
  },
  parts_sum: {
    en: "The sum of the weights, and the sum of the outputs times the weights.",
    zh: "权重之和，以及各部分输出乘以权重之和。",
  },
  parts_out: { en: "Divided, they are the output over all keys.", zh: "相除即得所有键的输出。" },
  parts_lse: { en: "And this is the LSE over all keys.", zh: "这就是所有键的 LSE。" },

  delta: {
    en: "δ of each query: its output times the output's gradient, summed. One number a row.",
    zh: "每个查询的 δ：输出乘以输出的梯度再求和。每行一个数。",
  },
  shift: {
    en: "The LSE of each query, as the other two kernels subtract it.",
    zh: "每个查询的 LSE，供另外两个内核相减。",
  },
  init_dkdv: {
    en: "Load the keys and values {rows}. dK and dV start at 0.",
    zh: "载入键和值 {rows}。dK 和 dV 从 0 开始。",
  },
  init_dq: {
    en: "Load the queries {rows} with their dO, LSE and δ. dQ starts at 0.",
    zh: "载入查询 {rows}，以及它们的 dO、LSE 和 δ。dQ 从 0 开始。",
  },
  rebuild: {
    en:
      "P rebuilt from the LSE: no maximum, no sum, no rescaling. {hidden} of {pairs} pairs" +
      " are hidden.",
    zh: "由 LSE 重新算出 P：不需要最大值、累加和、重缩放。{pairs} 对中有 {hidden} 对被遮住。",
  },
  dv: {
    en: "dV of the keys grows by P transposed times dO.",
    zh: "键的 dV 加上 P 的转置乘以 dO。",
  },
  dp: { en: "The gradient of P: dO times the values.", zh: "P 的梯度：dO 乘以值。" },
  ds: {
    en: "The gradient of the scores: P times (dP − δ), element by element.",
    zh: "分数的梯度：P 逐元素乘以 (dP − δ)。",
  },
  dk: {
    en: "dK of the keys grows by dS transposed times Q.",
    zh: "键的 dK 加上 dS 的转置乘以 Q。",
  },
  dq: { en: "dQ of the queries grows by dS times K.", zh: "查询的 dQ 加上 dS 乘以 K。" },
  dk_out: {
    en: "dK, times the scale, is stored: this program alone writes these rows, without atomics.",
    zh: "dK 乘以缩放因子后写入内存：这些行只由这个程序写，没有原子操作。",
  },
  dv_out: { en: "dV is stored.", zh: "dV 写入内存。" },
  dq_out: { en: "dQ, times the scale, is stored.", zh: "dQ 乘以缩放因子后写入内存。" },
};
